"""Weighted h-transform guidance: closed forms in float64, masks, every prediction type."""

import math

import diffusers
import pytest
import torch

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.guidance import APG, CFG, Point
from genkit.guidance.cfg_mp import CFGMP
from genkit.guidance.h_transform import HTransform
from genkit.interpolants import DiscreteVP, Linear, Trigonometric, VarianceExploding, from_scheduler
from genkit.sampling import sample
from genkit.testing.oracles import Gaussian, probability_flow, two_class_mixture

F64 = torch.float64
NOTHING = Condition()
UNGUIDED = dict(guidance_scale=1.0)


def time(t):
    return torch.tensor(t, dtype=F64)


def ask(guider, denoiser, z, t, condition=NOTHING, state=None):
    """The prediction to follow, after the checks that a loop makes."""
    guider.check(tuple(z.shape), condition)
    guider.check_network(denoiser.network, denoiser.interpolant, denoiser.prediction_type, tuple(z.shape), condition)
    return guider.guide(Point(denoiser, z, time(t), None, None, condition), state)[0].prediction


def euler(guider, denoiser, x, steps):
    times = torch.linspace(1, 0, steps + 1, dtype=F64).tolist()
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = x + (t_next - t) * ask(guider, denoiser, x, t).velocity
    return x


# -- closed forms ---------------------------------------------------------------------------------------------------

# x_0 = A x_1 + C y on the linear path, for data N(0, s^2): exponent to (A, C) for s^2 = 1 and for s^2 = 0.25.
TABLE = {
    0: ((0, 1), (0, 1)),
    1: ((0.45594, 0.77509), (0.30641, 0.62845)),
    2: ((0.75171, 0.51352), (0.43707, 0.33797)),
    5: ((0.94776, 0.22376), (0.49157, 0.12022)),
    10: ((0.98750, 0.10842), (0.49832, 0.05518)),
    16: ((0.99541, 0.06609), (0.49941, 0.03326)),
    20: ((0.99714, 0.05235), (0.49964, 0.02628)),
}


def table_run():
    """Seven regions with an exponent each, under two laws; in the first sample x_1 = 1, in the second y = 1."""
    law = Gaussian(torch.zeros(2, 7), torch.tensor([[1.0], [0.5]]).expand(2, 7))
    x = torch.tensor([1.0, 0.0], dtype=F64).view(2, 1, 1).expand(2, 2, 7)
    guider = HTransform(exponent=list(map(float, TABLE)), **UNGUIDED)
    return law.denoiser(), guider.using(reference=1 - x, masks=list(torch.eye(7).view(7, 1, 1, 7))), x


def expected_table():
    return torch.tensor([[[TABLE[a][law][k] for a in TABLE] for law in range(2)] for k in range(2)], dtype=F64)


def test_table():
    denoiser, guider, x = table_run()
    velocity = lambda x, t: ask(guider, denoiser, x, t[0].item()).velocity  # noqa: E731
    got = probability_flow(velocity, x, 1.0, 1e-6, steps=200)
    torch.testing.assert_close(got, expected_table(), rtol=0, atol=7e-6)
    a, c = got
    assert (a.diff(dim=1) > 0).all() and (c.diff(dim=1) < 0).all()


@pytest.mark.parametrize(("steps", "error"), [(200, 7e-3), (2000, 1e-3)])
def test_euler_is_that_close(steps, error):
    denoiser, guider, x = table_run()
    torch.testing.assert_close(euler(guider, denoiser, x, steps), expected_table(), rtol=0, atol=error)


@pytest.mark.parametrize(("steps", "followed", "plain"), [(10, 1.172, 0.879), (50, 1.034, 0.975)])
def test_a_first_step_at_pure_noise_follows_the_reference_whatever_the_exponent(steps, followed, plain):
    denoiser, x = Gaussian([0.0], 1.0).denoiser(), torch.ones(1, 1, dtype=F64)
    guider = HTransform(exponent=1e9, **UNGUIDED).using(reference=3 * x)
    assert euler(guider, denoiser, x, steps).item() == pytest.approx(followed, abs=5e-4)
    later = euler(guider.new(reference_start=1e-3), denoiser, x, steps)
    assert later.item() == pytest.approx(plain, abs=5e-4)
    assert torch.equal(later, euler(CFG(**UNGUIDED), denoiser, x, steps))


PATHS = {
    "linear": Linear(),
    "vp": from_scheduler(diffusers.DDIMScheduler()),
    "trigonometric": Trigonometric(),
    "ve": VarianceExploding(),
}
KINDS = pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])


@KINDS
@pytest.mark.parametrize("path", PATHS)
def test_every_prediction_type_guides_the_same_clean_sample(path, kind):
    law = two_class_mixture(4, interpolant=PATHS[path])
    z, y, t = torch.randn(3, 4, dtype=F64), torch.randn(1, 4, dtype=F64), 0.6
    sigma = law.interpolant.sigma(time(t))
    sigma = sigma / (1 + sigma**2).sqrt() if path == "ve" else sigma
    weight = sigma**2
    clean = law.denoise(z, time(t))
    expected = clean + weight * (y - clean)
    guider = HTransform(exponent=2, **UNGUIDED).using(reference=y)
    got = ask(guider, law.denoiser(kind), z, t)
    torch.testing.assert_close(got.sample, expected, rtol=1e-11, atol=1e-11)
    assert guider._notes["weight"] == pytest.approx(weight.item(), rel=1e-14)
    distance = (clean - y).square().mean(1).sqrt()
    torch.testing.assert_close(guider._notes["distance"], distance, rtol=1e-10, atol=0)


@KINDS
def test_a_reference_that_is_the_prediction_changes_nothing(kind):
    law = two_class_mixture(4, interpolant=PATHS["vp"])
    z = torch.randn(3, 4, dtype=F64)
    guider = HTransform(exponent=1, **UNGUIDED).using(reference=law.denoise(z, time(0.6)))
    plain = law.denoiser(kind)(z, time(0.6))
    torch.testing.assert_close(ask(guider, law.denoiser(kind), z, 0.6).raw, plain.raw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "scheduler", ["FlowMatchEulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"]
)
def test_full_weight_at_all_times_returns_the_reference(scheduler):
    scheduler = getattr(diffusers, scheduler)()
    scheduler.set_timesteps(20)
    kind = "epsilon" if "alphas_cumprod" in vars(scheduler) else "flow_prediction"
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    y = torch.rand(3, 4, dtype=F64) - 0.5
    guider = HTransform(exponent=0, **UNGUIDED).using(reference=y)
    got = sample(law.denoiser(kind), scheduler, torch.randn(3, 4, dtype=F64), guider=guider)
    torch.testing.assert_close(got.double(), y, rtol=0, atol=1e-5)


def test_nothing_is_divided_by_zero_at_the_ends():
    zero_signal = from_scheduler(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    assert isinstance(zero_signal, DiscreteVP) and zero_signal.alpha(time(1.0)) == 0
    z, y = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    for path, kind, at_noise in (
        (Linear(), "flow_prediction", z - y),
        (Linear(), "epsilon", z),
        (zero_signal, "epsilon", z),
        (zero_signal, "v_prediction", -y),
        (zero_signal, "sample", y),
    ):
        network = lambda x, t: torch.tanh(x)  # noqa: E731
        denoiser = FunctionDenoiser(network, path, kind)
        guider = HTransform(**UNGUIDED).using(reference=y)
        torch.testing.assert_close(ask(guider, denoiser, z, 1.0).raw, at_noise, rtol=1e-12, atol=1e-12)
        assert torch.equal(ask(guider, denoiser, z, 0.0).raw, torch.tanh(z))


def test_the_code_published_for_cogvideox():
    """At alpha = 0.6, sigma = 0.8 its reference velocity is off by -0.1875 x - 0.3125 y."""
    denoiser = FunctionDenoiser(lambda x, t: torch.zeros_like(x), Trigonometric(), "v_prediction")
    t = math.acos(0.6) / (math.pi / 2)
    z, y = torch.randn(4, 500, dtype=F64), torch.randn(4, 500, dtype=F64)
    right, legacy = (
        ask(HTransform(exponent=0, legacy_cogvideox=on, **UNGUIDED).using(reference=y), denoiser, z, t).raw
        for on in (False, True)
    )
    torch.testing.assert_close(right, (0.6 * z - y) / 0.8, rtol=0, atol=1e-14)
    torch.testing.assert_close(right, 0.6 * (z - 0.6 * y) / 0.8 - 0.8 * y, rtol=0, atol=1e-14)
    torch.testing.assert_close(legacy - right, -0.1875 * z - 0.3125 * y, rtol=0, atol=1e-13)
    assert (legacy - right).square().mean().sqrt().item() == pytest.approx(0.364, abs=0.02)
    guider = HTransform(exponent=4.0, legacy_cogvideox=True, **UNGUIDED).using(reference=y)
    ask(guider, denoiser, z, t)
    assert guider._notes["weight"] == pytest.approx(0.64**4)
    with pytest.raises(ValueError, match="legacy_cogvideox=True is a formula for v_prediction.*is flow_prediction"):
        ask(guider, Gaussian([0.0] * 500, 1.0).denoiser(), z, t)


def test_the_nearer_mode_is_chosen():
    """Early steps choose the mode, the model makes the rest: the more surely the lower the exponent, and the more
    dimensions tell the modes apart."""
    found, widths = {}, {}
    for dim, exponent in ((64, 2.0), (4096, 2.0), (4096, 20.0)):
        torch.manual_seed(0)
        x = torch.randn(48, dim, dtype=F64)
        guider = HTransform(exponent=exponent, **UNGUIDED).using(reference=torch.full((1, dim), 0.3, dtype=F64))
        out = euler(guider, two_class_mixture(dim).denoiser(), x, 25)
        found[dim, exponent] = (out.mean(1) > 0).double().mean().item()
        widths[dim, exponent] = out.std(1).mean().item()
    assert found[4096, 2.0] == 1.0 and 1 > found[4096, 20.0] > 0.6
    assert found[4096, 2.0] > found[64, 2.0]
    assert min(widths.values()) > 0.4  # the reference is flat; the law's standard deviation is 0.5


# -- regions, rows, weights -----------------------------------------------------------------------------------------


def image_law(shape=(4, 8, 8)):
    return Gaussian(torch.zeros(shape), 0.7)


def test_regions_are_what_each_exponent_makes_alone():
    denoiser, z = image_law().denoiser(), torch.randn(2, 4, 8, 8, dtype=F64)
    y = torch.randn(1, 4, 8, 8, dtype=F64)
    left = (torch.arange(8) < 3).view(1, 1, 1, 8)
    alone = [ask(HTransform(exponent=a, **UNGUIDED).using(reference=y), denoiser, z, 0.7).raw for a in (2.0, 8.0)]
    expected = torch.where(left, *alone)
    both = HTransform(exponent=[2.0, 8.0], **UNGUIDED)
    for masks in (left, [left, ~left], [left.double(), 1 - left.double()]):
        guider = both.using(reference=y, masks=masks)
        torch.testing.assert_close(ask(guider, denoiser, z, 0.7).raw, expected, rtol=1e-14, atol=1e-14)
    assert (guider._notes["weight_0"], guider._notes["weight_1"]) == pytest.approx((0.7**2, 0.7**8))
    top = (torch.arange(8) < 4).view(1, 1, 8, 1)
    three = [left & top, left & ~top, ~left]
    guider = HTransform(exponent=[2.0, 2.0, 8.0], **UNGUIDED).using(reference=y, masks=three)
    torch.testing.assert_close(ask(guider, denoiser, z, 0.7).raw, expected, rtol=1e-14, atol=1e-14)


def test_soft_masks_blend():
    denoiser, z, y = image_law().denoiser(), torch.randn(2, 4, 8, 8, dtype=F64), torch.randn(2, 4, 8, 8, dtype=F64)
    half = torch.full((1, 1, 8, 8), 0.5, dtype=F64)
    guider = HTransform(exponent=[1.0, 3.0], **UNGUIDED).using(reference=y, masks=half)
    clean = denoiser(z, time(0.6)).sample
    weight = (0.6 + 0.6**3) / 2
    torch.testing.assert_close(ask(guider, denoiser, z, 0.6).sample, clean + weight * (y - clean))


def test_references_and_masks_follow_their_samples():
    denoiser, z = image_law().denoiser(), torch.randn(3, 4, 8, 8, dtype=F64)
    y, masks = torch.randn(3, 4, 8, 8, dtype=F64), torch.rand(3, 1, 8, 8) > 0.5
    guider = HTransform(exponent=[1.0, 6.0], start=0.2, **UNGUIDED).using(reference=y, masks=masks)
    point = lambda z, t: Point(denoiser, z, time(t), None, None, NOTHING)  # noqa: E731
    _, state = guider.guide(point(z, 0.9), None)  # before the window
    whole, state = guider.guide(point(z, 0.7), state)
    index = torch.tensor([2, 0, 0])
    again, _ = guider.guide(point(z[index], 0.7), state.gather(index))
    torch.testing.assert_close(again.prediction.raw, whole.prediction.raw[index], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "path", "exponent"),
    [((4, 8, 8), "linear", 5), ((4, 3, 8, 8), "linear", 16), ((4, 3, 8, 8), "vp", 5), ((6,), "vp", 5)],
)
def test_images_and_video_have_their_default(shape, path, exponent):
    law = Gaussian(torch.zeros(shape), 0.7, interpolant=PATHS[path])
    z, y = torch.randn(2, *shape, dtype=F64), torch.randn(1, *shape, dtype=F64)
    guider = HTransform(**UNGUIDED).using(reference=y)
    got = ask(guider, law.denoiser(), z, 0.8)
    clean = law.denoise(z, time(0.8))
    weight = law.interpolant.sigma(time(0.8)) ** exponent
    torch.testing.assert_close(got.sample, clean + weight * (y - clean), rtol=1e-11, atol=1e-11)


def test_video_with_a_mask_that_moves():
    shape = (4, 3, 8, 8)
    denoiser, z, y = image_law(shape).denoiser(), torch.randn(2, *shape, dtype=F64), torch.randn(1, *shape, dtype=F64)
    mask = torch.zeros(1, 1, 3, 8, 8, dtype=torch.bool)
    for frame in range(3):
        mask[:, :, frame, :, frame : frame + 3] = True
    alone = [ask(HTransform(exponent=a, **UNGUIDED).using(reference=y), denoiser, z, 0.7).raw for a in (2.0, 9.0)]
    got = ask(HTransform(exponent=[2.0, 9.0], **UNGUIDED).using(reference=y, masks=mask), denoiser, z, 0.7).raw
    torch.testing.assert_close(got, torch.where(mask, *alone), rtol=1e-14, atol=1e-14)


def test_a_weight_of_ones_own():
    denoiser, z, y = image_law().denoiser(), torch.randn(2, 4, 8, 8, dtype=F64), torch.randn(1, 4, 8, 8, dtype=F64)
    guider = HTransform(exponent=3.0, **UNGUIDED).using(reference=y, weight_fn=lambda sigma, a: sigma / a)
    clean = denoiser(z, time(0.6)).sample
    torch.testing.assert_close(ask(guider, denoiser, z, 0.6).sample, clean + 0.2 * (y - clean))
    with pytest.raises(ValueError, match=r"weight_fn\(1, 0.5\)=2: accepted are weights in \[0, 1\]"):
        ask(guider.new(exponent=0.5), denoiser, z, 0.3)


def test_half_precision_mixes_in_float32():
    z, y = torch.randn(2, 64).half(), torch.randn(1, 64)
    denoiser = FunctionDenoiser(lambda x, t: torch.tanh(x), Linear(), "flow_prediction")
    guider = HTransform(exponent=16.0, **UNGUIDED).using(reference=100 * y)  # 0.4^16 is 4.3e-7, of a reference of 250
    got = ask(guider, denoiser, z, 0.4).raw
    raw = torch.tanh(z).double()
    expected = raw + 0.4**16 * ((z.double() - 100 * y.double()) / 0.4 - raw)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", [None, {"name": "apg", "guidance_scale": 6.0}, {"name": "cfg_mp", "ridge": 0.1}])
def test_the_combination_rule_comes_first(rule):
    law, t = two_class_mixture(4), 0.8
    labels = Condition({"class_labels": torch.zeros(3, dtype=torch.int64)}, {"class_labels": torch.full((3,), 2)})
    z, y = torch.randn(3, 4, dtype=F64), torch.randn(1, 4, dtype=F64)
    inner = {None: CFG(guidance_scale=3.0), "apg": APG(guidance_scale=6.0), "cfg_mp": CFGMP(ridge=0.1)}
    point = Point(law.denoiser(), z, time(t), time(0.6), None, labels)
    plain, _ = inner[rule and rule["name"]].guide(point, None)
    guider = HTransform(exponent=2.0, guidance_scale=3.0, rule=rule).using(reference=y)
    got, _ = guider.guide(point, None)
    clean = plain.prediction.sample
    torch.testing.assert_close(got.prediction.sample, clean + t**2 * (y - clean), rtol=1e-12, atol=1e-12)
    assert guider.moves_sample == (rule is not None and rule["name"] == "cfg_mp") == (got.z is not None)
    assert got.parts.keys() == plain.parts.keys() == {"cond", "uncond"}


def test_the_window_and_the_log_of_weights():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.8, 0.5, 0.2])
    denoiser = two_class_mixture(4).denoiser()
    labels = Condition({"class_labels": torch.zeros(3, dtype=torch.int64)}, {"class_labels": torch.full((3,), 2)})
    guider = HTransform(exponent=2.0, reference_start=0.15, reference_stop=0.6).using(reference=torch.zeros(1, 4))
    sample(denoiser, scheduler, torch.randn(3, 4), labels, guider=guider)
    stats = guider.stats()
    assert stats["network_calls"].tolist() == [2, 2, 2, 2] and denoiser.calls == 8
    assert stats["weight"][1:3].tolist() == pytest.approx([0.64, 0.25], rel=1e-6)
    assert stats["weight"].isnan().tolist() == [True, False, False, True]
    assert stats["distance"].shape == (4, 3) and stats["distance"].isfinite().sum() == 6


def test_without_a_condition_at_scale_one():
    """Unconditional and guidance-distilled models: no unconditional branch is asked for."""
    denoiser = image_law().denoiser()
    guider = HTransform(**UNGUIDED).using(reference=torch.zeros(1, 4, 8, 8))
    ask(guider, denoiser, torch.randn(2, 4, 8, 8), 0.7)
    assert denoiser.calls == 1
    with pytest.raises(ValueError, match="no unconditional branch"):
        ask(guider.new(guidance_scale=2.0), denoiser, torch.randn(2, 4, 8, 8), 0.7)
    assert denoiser.calls == 1
