"""Readout guidance: closed forms in float64, its gradient on a network, what is refused."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch import nn

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.guidance import CFG, Point, guided
from genkit.guidance.readout import AppearanceTarget, CorrespondenceTarget, Readout, SpatialTarget, direction
from genkit.guidance.readout_targets import correspondence_loss, resized, unit
from genkit.interpolants import Linear
from genkit.networks.readout_head import ReadoutHead, capture
from genkit.sampling import sample
from tests.guidance.ways import own_inputs

F64 = torch.float64
SMALL = dict(projection_dim=24, norm_num_groups=2)


class LinearHead(ReadoutHead):
    """``H f``: a head whose loss has a gradient that can be written down."""

    def forward(self, features, temb, size):
        return torch.einsum("oc,bchw->bohw", self.matrix, features[0].view(*features[0].shape[:2], 1, 1))


class World(nn.Module):
    """Features ``W x``, and a velocity that shifts with the condition."""

    def __init__(self, dim=6, features=8):
        super().__init__()
        self.body = nn.Linear(dim, features, bias=False, dtype=F64)
        self.out = nn.Linear(features, dim, bias=False, dtype=F64)

    def forward(self, x, t, shift):
        return torch.tanh(self.out(self.body(x))) + shift


def linear_world(channels=4):
    network = World()
    head = LinearHead(["body"], [8], out_channels=channels, **SMALL)
    head.matrix = torch.randn(channels, 8, dtype=F64)
    return FunctionDenoiser(network, Linear(), "flow_prediction"), head


def condition(batch=3):
    shift = torch.randn(batch, 6, dtype=F64)
    return Condition({"shift": shift}, {"shift": torch.zeros_like(shift)})


def point(denoiser, z, t=0.8, cond=None):
    return Point(denoiser, z, torch.tensor(t, dtype=F64), None, None, cond or condition(len(z)))


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e3, 1e-3])
def test_the_adam_step_is_a_sign_step(size):
    gradient = size * torch.tensor([[0.5, 2.0, -0.1]], dtype=F64)
    step = -0.02 * direction(gradient, "adam_sign")
    torch.testing.assert_close(step, torch.tensor([[-0.02, -0.02, 0.02]], dtype=F64), rtol=0, atol=1e-5)
    x = torch.zeros_like(gradient).requires_grad_()
    x.grad = gradient
    torch.optim.AdamW([x], lr=0.02, weight_decay=0).step()
    torch.testing.assert_close(step, x.detach(), rtol=1e-12, atol=0)


def test_the_adam_step_is_half_where_the_gradient_is_its_epsilon():
    half = direction(torch.tensor([[1e-8, -1e-8, 0.0]], dtype=F64), "adam_sign")
    torch.testing.assert_close(half, torch.tensor([[0.5, -0.5, 0.0]], dtype=F64), rtol=1e-12, atol=0)


def test_the_normalised_step_has_unit_rms_whatever_the_sample():
    gradient = torch.randn(3, 2, 4, dtype=F64) * torch.tensor([1.0, 1e-6, 0.0], dtype=F64).view(3, 1, 1)
    step = direction(gradient, "normalised").flatten(1)
    torch.testing.assert_close(step.square().mean(1), torch.tensor([1.0, 1.0, 0.0], dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("branches", ["both", "conditional"])
def test_linear_world(branches):
    denoiser, head = linear_world()
    control = torch.rand(3, 4, 1, 1, dtype=F64) - 0.5
    targets = {"map": SpatialTarget(head=head, control=control, weight=0.7)}
    guider = Readout(update="gradient", step_size=0.3, branches=branches).using(targets=targets)
    z = torch.randn(3, 6, dtype=F64)
    guided, _ = guider.guide(point(denoiser, z), None)
    w, h = denoiser.network.body.weight, head.matrix
    span = z.amax(1) - z.amin(1)
    residual = z @ w.T @ h.T - control[:, :, 0, 0]
    count = 2 if branches == "both" else 1  # both branches read the same features here
    gradient = 0.7 * count * span.square()[:, None] * 2 * residual @ h @ w / 4
    torch.testing.assert_close(guided.z, z - 0.3 * gradient, rtol=1e-11, atol=1e-12)
    loss = count * span.square() * residual.square().mean(1)
    torch.testing.assert_close(guider._notes["loss_map"], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(guider._notes["gradient_norm"], gradient.norm(dim=1), rtol=1e-11, atol=0)
    assert denoiser.calls == count + 2
    moved, _ = CFG().guide(point(denoiser, guided.z, cond=condition()), None)
    assert guided.prediction.z is guided.z and moved.prediction.raw.shape == guided.prediction.raw.shape


def test_steps_below_the_curvature_decrease_the_loss_every_time():
    denoiser, head = linear_world()
    matrix = head.matrix @ denoiser.network.body.weight
    targets = {"map": SpatialTarget(head=head, control=torch.rand(1, 4, 1, 1, dtype=F64) - 0.5)}
    z = torch.randn(3, 6, dtype=F64)
    losses, place, cond = [], z, condition()
    for _ in range(30):
        span = (place.amax(1) - place.amin(1)).max().item()
        curvature = 2 * span**2 * torch.linalg.matrix_norm(matrix, 2).item() ** 2 / 4
        guider = Readout(update="gradient", step_size=0.9 / curvature, branches="conditional").using(targets=targets)
        guided, _ = guider.guide(point(denoiser, place, cond=cond), None)
        # the loss in the head's own units: the range of the latents changes on the way
        losses.append(guider._notes["loss_map"] / (place.amax(1) - place.amin(1)).square())
        place = guided.z
    losses = torch.stack(losses)
    assert (losses[1:] < losses[:-1]).all() and (losses[-1] < 0.3 * losses[0]).all()


def test_inner_steps_are_steps_one_after_another():
    denoiser, head = linear_world()
    targets = {"map": SpatialTarget(head=head, control=torch.zeros(1, 4, 1, 1, dtype=F64))}
    z, cond = torch.randn(3, 6, dtype=F64), condition()
    three, one = (Readout(update="normalised", inner_steps=n).using(targets=targets) for n in (3, 1))
    place = z
    for _ in range(3):
        place = one.guide(point(denoiser, place, cond=cond), None)[0].z
    torch.testing.assert_close(three.guide(point(denoiser, z, cond=cond), None)[0].z, place, rtol=1e-13, atol=1e-13)


def test_weights_tell_between_targets():
    """Alone a weight does nothing to a sign step; among two it decides."""
    denoiser, head = linear_world()
    low, high = (SpatialTarget(head=head, control=torch.full((1, 4, 1, 1), v, dtype=F64)) for v in (-0.5, 0.5))
    z, cond = torch.randn(2, 6, dtype=F64), condition(2)

    def moved(**targets):
        return Readout().using(targets=targets).guide(point(denoiser, z, cond=cond), None)[0].z

    torch.testing.assert_close(moved(a=replace(low, weight=100.0)), moved(a=low))
    torch.testing.assert_close(moved(a=replace(low, weight=1e3), b=high), moved(a=low), rtol=0, atol=1e-6)
    assert torch.equal(moved(a=replace(low, weight=0.0)), z)


def test_correspondences_of_perfect_features():
    one_hot = torch.eye(16, dtype=F64).view(1, 16, 4, 4)
    pairs = torch.tensor([[[0, 1], [2, 3]], [[3, 0], [1, 1]]])[None]  # (0, 1) -> (2, 3), (3, 0) -> (1, 1)
    assert correspondence_loss(one_hot, one_hot, pairs[:, :, [0, 0]]).item() == 0
    moved = one_hot.clone()
    for (a, b), (c, d) in pairs[0].tolist():
        moved[..., [a, c], [b, d]] = one_hot[..., [c, a], [d, b]]
    torch.testing.assert_close(correspondence_loss(moved, one_hot, pairs), torch.tensor([-0.25], dtype=F64))
    torch.testing.assert_close(correspondence_loss(one_hot, one_hot, pairs), torch.tensor([0.25], dtype=F64))


def test_features_that_vanish_have_no_direction():
    features = torch.zeros(1, 3, 2, 2, dtype=F64, requires_grad=True)
    unit(features).sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    one = torch.randn(1, 3, 2, 2, dtype=F64)
    torch.testing.assert_close(unit(one).square().sum(1), torch.ones(1, 2, 2, dtype=F64))


def test_maps_are_averaged_over_pixels():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resized(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(x, (4, 4)) is x or torch.equal(resized(x, (4, 4)), x)


# -- on a network ---------------------------------------------------------------------------------------------------


def network_of(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def made(pipe, *, channels=4, kinds=("map", "look", "move"), **settings):
    """A guider with a target of every kind for 16 x 16 latents; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        spatial = ReadoutHead.for_network(network_of(pipe), out_channels=1, **SMALL)
        feature = ReadoutHead.for_network(network_of(pipe), kind="feature", **SMALL)
        reference = torch.randn(1, channels, 16, 16)
        targets = {
            "map": SpatialTarget(head=spatial, control=torch.rand(1, 1, 32, 32) - 0.5),
            "look": AppearanceTarget(head=feature, reference=reference, weight=0.1),
            "move": CorrespondenceTarget(head=feature, reference=reference, points=torch.randint(0, 16, (4, 2, 2))),
        }
    settings = dict(guidance_scale=3.0, step_size=0.1, readout_stop=0.8) | settings
    return Readout(**settings).using(targets={k: targets[k] for k in kinds})


@pytest.fixture
def sd15(tiny_pipeline):
    """Denoiser, latents and condition of a tiny SD 1.5."""
    pipe = tiny_pipeline("sd15")
    x, cond = own_inputs(pipe, "sd15")
    return pipe, from_pipeline(pipe), x, cond


def test_nothing_pulls_where_the_readout_is_what_is_wanted(sd15):
    pipe, denoiser, x, cond = sd15
    t = torch.tensor(0.8, dtype=F64)
    guider = made(pipe, kinds=("map",), branches="conditional")
    head = guider.given("targets")["map"].head
    _, seen = capture(denoiser, [head], x, t, cond)
    now = SpatialTarget(head=head, control=head.read(seen, (16, 16)).detach(), control_range=(-1, 1))
    guided, _ = guider.using(targets={"map": now}).guide(Point(denoiser, x, t, None, None, cond), None)
    assert torch.equal(guided.z, x)
    noise = torch.randn_like(x)
    look = AppearanceTarget(head=made(pipe).given("targets")["look"].head, reference=x, noise=noise)
    z = denoiser.interpolant.interpolate(x, noise, t)
    guider = Readout().using(targets={"look": look})
    guider.guide(Point(denoiser, z, t, None, None, cond), None)
    assert guider._notes["loss_look"].item() < 1e-5 and guider._notes["gradient_norm"].item() < 1e-5


@pytest.mark.parametrize("branches", ["both", "conditional"])
def test_the_gradient_is_that_of_one_backward(branches, sd15):
    """Freezing, checkpoints, two stages and branches one after the other change nothing."""
    pipe, denoiser, x, cond = sd15
    pipe.unet.double()
    x, cond, t = x.double(), cond.to(F64), torch.tensor(0.8, dtype=F64)
    guider = made(pipe, update="gradient", branches=branches)
    targets = guider.given("targets")
    for target in targets.values():
        target.head.double()
    guided, _ = guider.guide(Point(denoiser, x, t, None, None, cond), None)
    z = x.clone().requires_grad_()
    total, span = 0, (x.max() - x.min()).reshape(1)
    for c in [cond, cond.null()][: 2 if branches == "both" else 1]:
        _, seen = capture(denoiser, [t.head for t in targets.values()], z, t, c)
        for name, target in targets.items():
            reference = None
            if name != "map":
                noisy = target.noisy(denoiser.interpolant, t, x, torch.arange(1))
                with torch.no_grad():
                    reference = target.head.read(capture(denoiser, [target.head], noisy, t, c)[1], (16, 16))
            readout = target.head.read(seen, (16, 16))
            total = total + target.weight * target.loss(readout, reference, torch.arange(1), span).sum()
    total.backward()
    torch.testing.assert_close(guided.z, x - 0.1 * z.grad, rtol=1e-10, atol=1e-12)


def test_references_that_are_one_cost_one_call(sd15):
    pipe, denoiser, x, cond = sd15
    t = torch.tensor(0.8, dtype=F64)
    made(pipe).guide(Point(denoiser, x, t, None, None, cond), None)
    assert denoiser.calls == 2 * (1 + 1) + 2
    denoiser.calls = 0
    made(pipe, inner_steps=3, branches="conditional").guide(Point(denoiser, x, t, None, None, cond), None)
    assert denoiser.calls == 1 + 3 + 2


def test_samples_do_not_share_the_range_of_their_latents(sd15):
    pipe, denoiser, x, cond = sd15
    cond, t = cond.repeat(2), torch.tensor(0.8, dtype=F64)
    x = torch.cat((x, 5 * x.flip(-1)))
    guider = made(pipe, update="gradient", step_size=1e-3)
    both, _ = guider.guide(Point(denoiser, x, t, None, None, cond), None)
    one, _ = guider.guide(Point(denoiser, x[:1], t, None, None, cond.index([0])), None)
    torch.testing.assert_close(both.z[:1], one.z, rtol=1e-5, atol=1e-6)


def test_targets_follow_their_samples(sd15):
    """A target a sample: re-indexing the state re-indexes what each sample is pulled towards."""
    pipe, denoiser, x, cond = sd15
    x, cond, t = torch.cat((x, -x, x.flip(-1))), cond.repeat(3), torch.tensor(0.8, dtype=F64)
    guider = made(pipe, kinds=("map",))
    target = guider.given("targets")["map"]
    guider = guider.using(targets={"map": replace(target, control=torch.rand(3, 1, 16, 16) - 0.5)})
    whole, state = guider.guide(Point(denoiser, x, t, None, None, cond), None)
    index = torch.tensor([2, 0, 0])
    again, _ = guider.guide(Point(denoiser, x[index], t, None, None, cond), state.gather(index))
    torch.testing.assert_close(again.z, whole.z[index], rtol=1e-5, atol=1e-5)
    fresh, _ = guider.guide(Point(denoiser, x[index], t, None, None, cond), None)
    assert (fresh.z - again.z).abs().max() > 1e-2


def test_pooling_and_boxes(sd15):
    pipe, denoiser, x, cond = sd15
    t = torch.tensor(0.8, dtype=F64)
    look = made(pipe).given("targets")["look"]
    z = denoiser.interpolant.interpolate(look.reference, torch.zeros_like(x), t)
    look = replace(look, noise=torch.zeros_like(x))

    def loss(z, **changes):
        guider = Readout(branches="conditional").using(targets={"look": replace(look, **changes)})
        guider.guide(Point(denoiser, z.float(), t, None, None, cond), None)
        return guider._notes["loss_look"].item()

    assert loss(z) < 1e-5 < loss(z.flip(-1))
    assert loss(z.flip(-1), pool=True) < loss(z.flip(-1))
    assert loss(z, box=(2, 3, 9, 11), reference_box=(2, 3, 9, 11)) < 1e-5 < loss(z, box=(2, 3, 9, 11))


def test_a_gradient_that_is_not_finite_is_left_out():
    denoiser, head = linear_world()
    control = torch.zeros(1, 4, 1, 1, dtype=F64)
    z = torch.randn(3, 6, dtype=F64)
    z[1] *= 1e200  # its loss overflows
    guider = Readout(inner_steps=2).using(targets={"map": SpatialTarget(head=head, control=control)})
    guided, _ = guider.guide(point(denoiser, z), None)
    assert torch.equal(guided.z[1], z[1]) and (guided.z[[0, 2]] != z[[0, 2]]).all()
    assert guider._notes["skipped"].tolist() == [0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_gradients(dtype, sd15):
    """The network runs in half precision, everything between it and the sample in float32."""
    pipe, denoiser, x, cond = sd15
    targets = made(pipe).given("targets")
    weak = {name: replace(target, weight=1e-9 * target.weight) for name, target in targets.items()}
    t, found = torch.tensor(0.8, dtype=F64), {}
    for kind in (torch.float32, dtype):
        pipe.unet.to(kind)
        guider = Readout(update="normalised").using(targets=weak)
        place = Point(from_pipeline(pipe), x.to(kind), t, None, None, cond.to(kind))
        guided, _ = guider.guide(place, None)
        assert guided.z.dtype == torch.float32 and guider._notes["skipped"].item() == 0
        found[kind] = (guided.z - x.to(kind)).flatten()
    assert torch.cosine_similarity(found[torch.float32], found[dtype], dim=0) > 0.97


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=-1.0), "guidance_scale=-1.0"),
        (dict(step_size=-0.1), "step_size=-0.1: accepted is 0 <= step_size"),
        (dict(inner_steps=0), "inner_steps=0: accepted is 1 <= inner_steps"),
        (dict(update="adam"), "update='adam' is not known; did you mean 'adam_sign'"),
        (dict(branches="cond"), "branches='cond' is not known"),
        (dict(readout_start=0.6), "readout_stop=0.5: accepted is 0.6 <= readout_stop <= 1"),
        (dict(rule={"name": "agp"}), r"rule\['name'\]='agp' is not known; did you mean 'apg'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Readout(**settings)


BAD_TARGETS = {
    "nothing": (lambda t: {}, "targets={}: accepted is a dict of SpatialTarget.*, at least one"),
    "no_dict": (lambda t: [t["map"]], "targets=list: accepted is a dict"),
    "no_target": (lambda t: {"map": t["map"].head}, r"targets\['map'\]=ReadoutHead: accepted"),
    "wrong_head": (lambda t: {"a": replace(t["map"], head=t["look"].head)}, "head of kind 'spatial', got 'feature'"),
    "weight": (lambda t: {"a": replace(t["map"], weight=float("nan"))}, r"targets\['a'\].weight=nan"),
    "channels": (lambda t: {"a": replace(t["map"], control=torch.zeros(1, 3, 16, 16))}, r"accepted is \(1 or B, 1, H"),
    "values": (lambda t: {"a": replace(t["map"], control=torch.ones(1, 1, 16, 16))}, "values from 1 to 1; accepted is"),
    "nan": (lambda t: {"a": replace(t["map"], control=torch.full((1, 1, 16, 16), torch.nan))}, "values from nan"),
    "range": (lambda t: {"a": replace(t["map"], control_range=(0.5, -0.5))}, "accepted is low < high"),
    "rows": (lambda t: {"a": replace(t["map"], control=torch.zeros(2, 1, 16, 16))}, "has 2 rows; accepted is 1, or"),
    "shape": (lambda t: {"a": replace(t["map"], control=torch.zeros(1, 1, 16, 32))}, "16 x 32, which has not the prop"),
    "reference": (lambda t: {"a": replace(t["look"], reference=torch.zeros(1, 4, 8, 8))}, "reference has shape"),
    "noise": (lambda t: {"a": replace(t["look"], noise=torch.zeros(1, 3, 16, 16))}, r"\].noise has shape"),
    "box": (lambda t: {"a": replace(t["look"], box=(0, 0, 17, 16))}, r"box=\(0, 0, 17, 16\): accepted is \(top"),
    "outside": (lambda t: {"a": replace(t["move"], points=torch.full((1, 2, 2), 16))}, "within 16 x 16 latents"),
    "points": (lambda t: {"a": replace(t["move"], points=torch.zeros(2, 2))}, "accepted are integers"),
}


@pytest.mark.parametrize("which", BAD_TARGETS)
def test_bad_targets_are_refused_before_the_first_call(which, sd15):
    make, message = BAD_TARGETS[which]
    pipe, denoiser, x, cond = sd15
    guider = Readout().using(targets=make(made(pipe).given("targets")))
    with pytest.raises(ValueError, match=message):
        sample(denoiser, pipe.scheduler, x, cond, guider=guider)
    assert denoiser.calls == 0


def test_bad_targets_of_packed_latents(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    guider = made(pipe)
    guider.check((1, 64, 16))
    targets = guider.given("targets")
    for bad, message in (
        (torch.zeros(1, 64, 16), r"accepted are unpacked latents \(1 or B, C, H, W\)"),
        (torch.zeros(1, 4, 8, 8), r"accepted is \(1 or 1, 4, H, W\) of an even size and 64 patches"),
        (torch.full((1, 4, 16, 16), torch.nan), r"targets\['a'\]\.reference has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            guider.using(targets={"a": replace(targets["look"], reference=bad)}).check((1, 64, 16))
    with pytest.raises(ValueError, match="has not the proportions of samples of shape"):
        guider.using(targets={"a": replace(targets["map"], control=torch.zeros(1, 1, 16, 48))}).check((1, 64, 16))
    with pytest.raises(ValueError, match=r"samples of shape \(1, 4, 3, 16, 16\): .* images"):
        guider.check((1, 4, 3, 16, 16))


def test_what_forbids_gradients_is_refused(sd15, run_pipeline):
    pipe, denoiser, x, cond = sd15
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode forbids"):
        sample(denoiser, pipe.scheduler, x, cond, guider=made(pipe))
    head = ReadoutHead(["time_embedding"], [32], out_channels=1, **SMALL)
    guider = Readout().using(targets={"a": SpatialTarget(head=head, control=torch.zeros(1, 1, 16, 16))})
    with pytest.raises(ValueError, match=r"no gradient reaches the sample from \['time_embedding'\]"):
        sample(denoiser, pipe.scheduler, x, cond, guider=guider)
    with pytest.raises(ValueError, match="without classifier-free guidance"), guided(pipe, made(pipe)):
        run_pipeline(pipe, "sd15", guidance_scale=1.0)


def test_schedulers_that_remember_are_refused(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="Readout moves the sample"), guided(pipe, made(pipe)):
        pass
