"""Direct discriminative optimisation: the tabular optima, the first step, what the loss does not depend on."""

import copy
import math

import pytest
import torch
from torch import nn

from genkit.denoisers.base import Condition
from genkit.denoisers.function import FunctionDenoiser
from genkit.interpolants import Linear, VariancePreserving
from genkit.rng import ItemRNG
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.objectives.base import Batch, DivergedError
from genkit.training.objectives.ddo import DDO, DDOConfig, ddo_loss
from genkit.training.trainer import Trainer

F64 = torch.float64

# -- tabular: distributions on a grid of 601 points on [-6, 6]

X = torch.linspace(-6, 6, 601, dtype=F64)


def normal(mean, std):
    density = torch.exp(-((X - mean) ** 2) / (2 * std**2))
    return density / density.sum()


DATA, REF = (normal(1.5, 0.5) + normal(-1.5, 0.5)) / 2, normal(0, 2)


def tabular(log_ratio, ref, alpha, beta):
    """``ddo_loss`` under expectations instead of samples."""
    real, fake = nn.functional.softplus(-beta * log_ratio), nn.functional.softplus(beta * log_ratio)
    return (DATA * real).sum() + alpha * (ref * fake).sum()


def test_the_tabular_loss_is_that_of_samples():
    log_ratio = torch.linspace(-3, 4, 601, dtype=F64)
    draws = [
        torch.multinomial(p, 400_000, replacement=True, generator=torch.Generator().manual_seed(0)) for p in (DATA, REF)
    ]
    sampled = ddo_loss(log_ratio[draws[0]], log_ratio[draws[1]], 4.0, 0.7)
    assert sampled.item() == pytest.approx(tabular(log_ratio, REF, 4.0, 0.7).item(), abs=0.02)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def distance(p, q):
    return (p - q).abs().sum().item() / 2


def optimum(alpha, beta):
    """The minimiser among normalised distributions, and its loss."""
    scale = (alpha * REF + DATA).rsqrt() / beta  # near the curvature, which falls with the mass
    u = torch.zeros_like(REF).requires_grad_()
    optimizer = torch.optim.LBFGS([u], max_iter=400, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = tabular((REF.log() + scale * u).log_softmax(0) - REF.log(), REF, alpha, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (REF.log() + scale * u).detach().softmax(0), closure().item()


def test_the_optimum_is_the_data_at_alpha_and_beta_one():
    p, loss = optimum(1, 1)
    middle = (DATA + REF) / 2
    divergence = (kl(DATA, middle) + kl(REF, middle)) / 2
    assert 2 * math.log(2) - 2 * divergence == pytest.approx(1.1015107, abs=1e-7)
    assert loss == pytest.approx(1.1015107, abs=2e-7) and distance(p, DATA) < 1e-4


@pytest.mark.parametrize(
    "alpha, beta, to_data, to_pointwise, pointwise_to_data",
    [
        (1, 0.5, 0.1006, 0.0680, 0.1631),
        (1, 0.1, 0.198, 0.359, 0.499),
        (4, 1, 0.735, None, 0.0),
        (4, 0.5, 0.866, None, 0.163),
    ],
)
def test_elsewhere_the_optimum_is_another(alpha, beta, to_data, to_pointwise, pointwise_to_data):
    """Nor is it the pointwise solution ``p_ref (p_data / alpha p_ref)^(1/beta)``, normalised."""
    p, _ = optimum(alpha, beta)
    pointwise = REF * (DATA / (alpha * REF)) ** (1 / beta)
    if (alpha, beta) == (4, 1):
        assert pointwise.sum().item() == pytest.approx(0.25, abs=1e-6)  # the rest of the mass leaks
    pointwise /= pointwise.sum()
    assert distance(p, DATA) == pytest.approx(to_data, abs=2e-3)
    assert distance(pointwise, DATA) == pytest.approx(pointwise_to_data, abs=1e-3)
    if to_pointwise is not None:
        assert distance(p, pointwise) == pytest.approx(to_pointwise, abs=1e-3)


@pytest.mark.parametrize(
    "alpha, beta, table",
    [
        (1, 1.0, (0.175, 0.047, 0.0113, 0.0032, 0.0009)),
        (1, 0.05, (0.169, 0.069, 0.085, 0.038, 0.056)),
        (4, 0.05, (0.158, 0.093, 0.157, 0.049, 0.118)),
    ],
)
def test_self_play(alpha, beta, table):
    """60 steps of Adam a round: KL(data | p) after each. Tolerance: the table's rounding, and Adam's noise on top."""
    ref, got = REF, []
    assert kl(DATA, ref) == pytest.approx(0.507, abs=5e-4)
    for _ in table:
        logits = ref.log().requires_grad_()
        adam = torch.optim.Adam([logits], lr=1e-2)
        for _ in range(60):
            adam.zero_grad()
            tabular(logits.log_softmax(0) - ref.log(), ref, alpha, beta).backward()
            adam.step()
        ref = logits.detach().softmax(0)
        got.append(kl(DATA, ref))
    assert got == pytest.approx(table, abs=1e-3, rel=0.02)


# -- the loss


@pytest.mark.parametrize("alpha, loss", [(1, 1.386294), (4, 3.465736)])
def test_loss_at_the_reference(alpha, loss):
    assert ddo_loss(torch.zeros(3), torch.zeros(5), alpha, 0.05).item() == pytest.approx(loss, abs=1e-6)


def test_loss_and_gradient_are_finite_far_out():
    delta = torch.tensor([-1e4, -100.0, 100.0, 1e4]).requires_grad_()
    loss = ddo_loss(delta, delta, 4.0, 1.0)
    loss.backward()
    # softplus(-d) + 4 softplus(d), summed over +-d, is 5 |d|
    assert loss.item() == pytest.approx(5 * (1e4 + 100) / 4, rel=1e-6) and delta.grad.isfinite().all()


class MLP(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        layers = [nn.Linear(3, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 2)]
        self.body = nn.Sequential(*layers).double()

    def forward(self, x, t, class_labels=None):
        shift = 0 if class_labels is None else class_labels[:, None]
        return self.body(torch.cat((x, t[:, None].to(x)), dim=1)) + 0.1 * shift


def make(net=None, teacher=None, path=None, prediction_type="flow_prediction", **settings) -> DDO:
    torch.manual_seed(0)
    student = FunctionDenoiser(net or MLP(), path or Linear(), prediction_type)
    return DDO(DDOConfig(**settings), student, teacher)


def batch(n=64, start=0, **fields):
    index = torch.arange(start, start + n)
    draws = ItemRNG(9, index)
    x0, fake = draws.normal((2,), dtype=F64), 2 * draws.normal((2,), dtype=F64)
    return Batch(x0, Condition(), index, {"fake": fake} | fields), ItemRNG(0, index)


def moved(objective, size=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in objective.student_module.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return objective


def loss_of(objective, data):
    (phase,) = objective.phases(0)
    return objective(phase, *data)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_the_first_step(alpha):
    """Loss ``(1 + alpha) log 2`` to the last bit, gradient ``beta/2 (grad E_data e - alpha grad E_fake e)``."""
    beta = 0.2
    objective = make(MLP(dropout=0.5), alpha=alpha, beta=beta)
    objective.train()
    data, rng = batch()
    loss = loss_of(objective, (data, rng))
    two = torch.full((64,), 0.0, dtype=F64)
    assert torch.equal(loss.value, ddo_loss(two, two, alpha, beta)) and loss.logs["beta_delta"] == 0
    assert loss.value.item() == pytest.approx((1 + alpha) * math.log(2), rel=1e-15) and loss.logs["accuracy"] == 0.5
    loss.value.backward()

    own = copy.deepcopy(objective.student_module).eval()
    own.zero_grad()
    rng = ItemRNG(0, data.index)
    rng.uniform()  # whether the condition is dropped
    times = [rng.uniform(), rng.uniform()]
    errors = []
    for x0, t in zip((data.x0, data.fields["fake"]), times, strict=True):
        eps = rng.normal((2,), dtype=F64)
        x = (1 - t.double())[:, None] * x0 + t.double()[:, None] * eps
        errors.append((own(x, t) - (eps - x0)).square().sum(1).mean())
    (beta / 2 * (errors[0] - alpha * errors[1])).backward()
    for a, b in zip(objective.student_module.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_constant_added_to_both_errors_changes_nothing():
    """An output that neither network can influence stands for it: a dimension in which both are wrong alike."""
    plain = moved(make())

    class Wider(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, t):
            return torch.cat((self.inner(x[:, :2], t), torch.zeros_like(x[:, 2:]).fill_(7.0)), dim=1)

    (data, rng), deltas = batch(), []
    pairs = torch.cat((data.x0, data.fields["fake"]))
    deltas.append(plain.log_ratio(pairs, Condition(), rng))
    for objective in (plain,):
        objective.student.network = Wider(objective.student.network)
        objective.reference.network = Wider(objective.reference.network)

    class Same(ItemRNG):  # the same noise in the dimensions that both runs have
        def normal(self, shape=(), *, dtype=torch.float32):
            return torch.cat((super().normal((2,), dtype=dtype), torch.ones(len(self), 1, dtype=dtype)), dim=1)

    wide = torch.cat((pairs, torch.zeros(128, 1, dtype=F64)), dim=1)
    deltas.append(plain.log_ratio(wide, Condition(), Same(0, data.index)))
    assert deltas[0].abs().max() > 0.1
    torch.testing.assert_close(deltas[1], deltas[0], rtol=0, atol=1e-12)


def test_swapping_real_and_fake_flips_the_gradient_at_the_reference():
    delta = torch.zeros(2, 4, dtype=F64).requires_grad_()
    (there,) = torch.autograd.grad(ddo_loss(delta[0], delta[1], 1.0, 0.3), delta)
    (back,) = torch.autograd.grad(ddo_loss(delta[1], delta[0], 1.0, 0.3), delta)
    assert torch.equal(there, -back) and there.abs().min() > 0


@pytest.mark.parametrize("settings", [dict(error="epsilon"), dict(error="sample"), dict(snr_gamma=5.0)])
@pytest.mark.parametrize("path", [Linear(), VariancePreserving()])
def test_the_views_of_the_error_are_the_same_error_weighted(settings, path):
    """``e_eps^2 = (alpha / sigma)^2 e_x0^2``, ``e_flow^2 = e_x0^2 / t^2`` on the linear path."""
    times = dict(law="uniform", low=0.2, high=0.8)
    data, rng = batch()
    pairs = torch.cat((data.x0, data.fields["fake"]))
    torch.manual_seed(0)
    objective = moved(make(path=path, times=times, **settings))
    got = objective.log_ratio(pairs, Condition(), rng)
    objective.config = DDOConfig(times=times, error="sample")
    clean = objective.log_ratio(pairs, Condition(), ItemRNG(0, data.index))
    again = ItemRNG(0, data.index)
    t = torch.cat([objective.config.times.draw(again), objective.config.times.draw(again)]).double()
    snr = (path.alpha(t) / path.sigma(t)).square()
    weight = {"epsilon": snr, "sample": torch.ones_like(snr)}.get(settings.get("error"), snr.clamp(max=5))
    torch.testing.assert_close(got, weight * clean, rtol=1e-5, atol=1e-9)  # times are float32


@pytest.mark.parametrize("size", [1, 16])
def test_a_batch_equals_its_micro_batches(size):
    objective = moved(make(alpha=2.0))
    whole = loss_of(objective, batch(64)).value
    parts = [loss_of(objective, batch(size, start)).value for start in range(0, 64, size)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)


def test_the_reference_is_the_teacher_or_a_frozen_copy():
    teacher = FunctionDenoiser(MLP(), Linear(), "flow_prediction")
    assert make(teacher=teacher).reference is teacher
    objective = make()
    before = copy.deepcopy(objective.reference.module.state_dict())
    moved(objective)
    assert all(torch.equal(v, before[k]) for k, v in objective.reference.module.state_dict().items())
    assert objective.roles["reference"].trains is False
    assert not any(p.requires_grad for p in objective.reference.module.parameters())


def test_both_sides_see_one_condition():
    labels = torch.arange(64) % 3
    data, rng = batch()
    data.condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 3)})
    seen = []
    objective = make(condition_dropout=0.5)
    inner = objective.student_module.forward
    objective.student_module.forward = lambda x, t, class_labels: (seen.append(class_labels), inner(x, t))[1]
    loss_of(objective, (data, rng))
    (label,) = seen
    assert torch.equal(label[:64], label[64:]) and 10 < (label[:64] == 3).sum() < 54
    kept = label[:64] != 3
    assert torch.equal(label[:64][kept], labels[kept])


def test_saturated_sigmoids_stop_the_run():
    objective = moved(make(beta=1e3), 3.0)
    with pytest.raises(DivergedError, match=r"mean of \|beta delta\| is .* saturation_limit=10.*Lower beta=1000"):
        loss_of(objective, batch())


def test_bad_input(toys, tmp_path):
    with pytest.raises(ValueError, match="error='epsilon' and snr_gamma=5 both weigh"):
        DDOConfig(error="epsilon", snr_gamma=5)
    data, rng = batch()
    with pytest.raises(ValueError, match="not the field 'fake'.*add a section rounds"):
        loss_of(make(), (Batch(data.x0, Condition(), data.index), rng))
    with pytest.raises(ValueError, match=r"fakes have shape \(3,\), real samples \(2,\)"):
        loss_of(make(), batch(fake=torch.zeros(64, 3)))
    settings = toys.settings(tmp_path, objective=dict(name="ddo"), mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision='bf16': objective='ddo' learns from small differences"):
        TrainConfig(**settings).check()


# -- any network


@pytest.mark.parametrize("name, kind", [("sd15", "lora"), ("dit", "full"), ("flux", "lora")])
def test_tiny_networks(name, kind, tiny_pipeline, tmp_path):
    """A few steps, the reference untouched; what is trained by LoRA needs no second network."""
    tiny_pipeline(name).save_pretrained(tmp_path / "model")
    fields = {"fake": dict(shape=(4, 16, 16))}
    labels = dict(num_classes=1000) if name == "dit" else dict(prompts=True)
    config = TrainConfig(
        output_dir=tmp_path / "run",
        model=dict(pretrained=str(tmp_path / "model")),
        adapter=dict(kind=kind, rank=4),
        objective=dict(name="ddo", alpha=1.0, beta=0.01),
        data=dict(name="synthetic", shape=(4, 16, 16), fields=fields, **labels),
        optimizer=dict(name="AdamW", lr=1e-3),
        global_batch_size=4,
        max_train_steps=4,
        checkpointing_steps=4,
        logging_steps=1,
    ).check()
    trainer = Trainer(build(config), quiet=True)
    assert ("reference" in trainer.objective.roles) == (kind == "full")
    seen = []
    original = trainer.metrics.add
    trainer.metrics.add = lambda step, values: (seen.append(float(values["loss"])), original(step, values))
    trainer.train()
    assert seen[0] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert all(map(math.isfinite, seen)) and seen[-1] != seen[0]
