"""DRO and Diffusion-DPO: gradients at the reference, what is bounded, labels and their signs, what does not matter."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genkit.denoisers import FunctionDenoiser, from_pipeline
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear, VariancePreserving
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training import logs
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.export import export
from genkit.training.objectives.base import Batch, DivergedError
from genkit.training.objectives.diffusion_dpo import DiffusionDPO
from genkit.training.objectives.dro import DRO
from genkit.training.parts.losses import mean_of_squares
from genkit.training.parts.times import Uniform

F64 = torch.float64
N = 12


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 2)).double()

    def forward(self, x, t, **condition):
        return self.body(torch.cat((x, t.to(x)[:, None]), 1))


def student(path=None, kind="flow_prediction", net=None):
    torch.manual_seed(0)
    return FunctionDenoiser(net or Net(), path or Linear(), kind)


def batch(n=N, **fields):
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(n, 2, dtype=F64, generator=generator)
    given = {"x0": x0, "lose": torch.randn(n, 2, dtype=F64, generator=generator) - 1}
    given |= {"score": (torch.arange(n) % 3 == 0).long(), "share": torch.where(torch.arange(n) % 3 == 0, 1 / 3, 2 / 3)}
    return Batch(x0, Condition(), torch.arange(n), given | fields)


def loss_of(objective, given=None, seed=7):
    given = given or batch()
    (phase,) = objective.phases(0)
    (loss,) = objective.losses(phase, given, ItemRNG(seed, given.index))
    return loss


def gradient(objective, *args):
    parameters = list(objective.student.module.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(objective, *args).value, parameters)])


def dro(net=None, **settings):
    return DRO(DRO.Config(**settings), net or student())


def dpo(net=None, **settings):
    return DiffusionDPO(DiffusionDPO.Config(**settings), net or student())


PAIRS = dict(feedback=dict(kind="pairs"))
PLAIN = dict(kind="plain", max_rise=None)


def moved(objective, size=0.1):
    """The objective with a student that is no longer its reference."""
    with torch.no_grad():
        torch.manual_seed(5)
        for p in objective.student.module.parameters():
            p.add_(size * torch.randn_like(p))
    return objective


# -- at the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=["linear", "vp"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "flow_prediction"])
def test_at_the_reference_both_have_one_direction(path, kind):
    """The ratio of the gradients is beta / 4, the loss of DPO log 2."""
    plain = gradient(dro(student(path, kind), form=PLAIN, **PAIRS))
    preferred = dpo(student(path, kind), beta=500.0, same_noise=False)
    assert loss_of(preferred).value.item() == pytest.approx(math.log(2), abs=1e-15)
    assert torch.allclose(gradient(preferred), 125 * plain, rtol=1e-12, atol=1e-14) and plain.norm() > 1e-2
    bounded = gradient(dro(student(path, kind), **PAIRS))
    assert torch.allclose(bounded, plain, rtol=1e-12, atol=1e-15)


def test_the_logit_is_exactly_zero_where_nothing_differs():
    """In spite of dropout, as a copy and as a LoRA switched off."""
    objective = dpo(student(net=Net(dropout=0.5)))
    objective.train()
    assert loss_of(objective).value == torch.tensor(2.0, dtype=F64).log()
    assert loss_of(objective).logs["implicit_accuracy"] == 0.5
    assert (loss_of(objective).logs["rise_w"], loss_of(objective).logs["rise_l"]) == (0, 0)


def test_a_lora_is_its_own_reference(toys, tmp_path):
    adapter = dict(kind="lora", rank=2)
    config = TrainConfig(**toys.settings(tmp_path, objective=dict(name="diffusion_dpo"), adapter=adapter)).check()
    run = build(config)
    assert set(run.objective.roles) == {"student"} and run.objective.reference.held is None
    read = run.source.__getitems__(range(4)) | {"index": torch.arange(4)}
    given = run.inputs(read, torch.device("cpu"))
    given.fields["lose"] = -given.x0
    with torch.no_grad():
        for name, p in run.student.module.named_parameters():
            if "lora" not in name:
                p.normal_(std=0.1)
    first = loss_of(run.objective, given)
    assert first.value.item() == pytest.approx(math.log(2), abs=1e-7) and first.logs["rise_w"] == 0
    with torch.no_grad():
        for name, p in run.student.module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    then = loss_of(run.objective, given)
    assert then.value != first.value and then.logs["rise_w"] != 0


def test_a_teacher_is_the_reference():
    teacher = student(net=Net())
    objective = DiffusionDPO(DiffusionDPO.Config(), student(), teacher)
    assert objective.reference is None and objective.roles["teacher"].trains is False
    same = dpo()
    same.reference.copy = copy.deepcopy(teacher)
    assert loss_of(objective).value == loss_of(same).value
    with pytest.raises(ValueError, match="objective.form there is none"):
        DRO(DRO.Config(form=dict(kind="sft")), student(), teacher)


# -- DRO -------------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """``k x + b``, one number each."""

    def __init__(self):
        super().__init__()
        self.k, self.b = (nn.Parameter(torch.tensor(v, dtype=F64)) for v in (0.5, 0.1))

    def forward(self, x, t):
        return self.k * x + self.b


def test_the_plain_form_has_no_minimum_and_the_bounded_ones_have_a_floor():
    """Winners N(1, 0.5^2), losers N(-1, 1), alpha 0.6: the Hessian in (k, b) has eigenvalues -2.685 and 2.145."""
    n = 400_000
    generator = torch.Generator().manual_seed(0)
    win, lose = torch.randn(2, n, 1, dtype=F64, generator=generator)
    given = Batch(1 + win / 2, Condition(), torch.arange(n), {"lose": lose - 1})
    settings = dict(times=dict(law="uniform", low=0.4, high=0.4 + 1e-7), **PAIRS)
    plain = dro(student(kind="sample", net=Affine()), form=PLAIN, **settings)
    parameters = list(plain.student.module.parameters())
    first = torch.autograd.grad(loss_of(plain, given).value, parameters, create_graph=True)
    hessian = torch.stack([torch.stack(torch.autograd.grad(g, parameters, retain_graph=True)) for g in first])
    values, vectors = torch.linalg.eigh(hessian)
    assert values.tolist() == pytest.approx([-2.685, 2.145], abs=0.02)

    def far(objective):
        with torch.no_grad():
            for p, v in zip(objective.student.module.parameters(), vectors[:, 0], strict=True):
                p.add_(1000 * v)
            return loss_of(objective, given).value.item()

    assert far(plain) < -1e6
    form = dict(kind="clip", kappa=2.0, negative_weight=0.5, max_rise=None)
    clip = dro(student(kind="sample", net=Affine()), form=form, **settings)
    before = mean_error(clip, given)
    assert far(clip) >= -0.5 * 2.0 * before
    assert far(dro(student(kind="sample", net=Affine()), form=dict(kind="softplus", max_rise=None), **settings)) >= 0


def mean_error(objective, given):
    """Mean error of the reference on rejected samples."""
    loss_of(objective, given)
    _, sums = objective.watch.sums
    return (sums[2] / sums[0]).item()


def test_labels_decide_the_sign_and_scores_interpolate():
    ones, zeros = torch.ones(N, dtype=F64), torch.zeros(N, dtype=F64)
    flat = dict(form=PLAIN, feedback=dict(kind="scores", max_weight=1))
    accepted, rejected = (loss_of(dro(**flat), batch(score=s)).value for s in (ones, zeros))
    # All accepted: the plain training loss, at the same times and noise.
    objective = dro(**flat)
    rng, given = ItemRNG(7, torch.arange(N)), batch()
    t = objective.times.draw(rng)
    eps = rng.normal((2,), dtype=F64)
    x = objective.student.interpolant.interpolate(given.x0, eps, t)
    training = mean_of_squares(objective.student(x, t).raw - (eps - given.x0)).mean()
    assert accepted.item() == pytest.approx(training.item(), rel=1e-14)
    assert rejected == -accepted
    scores = torch.linspace(0, 1, N, dtype=F64)
    mixed = loss_of(dro(**flat), batch(score=scores)).value + loss_of(dro(**flat), batch(score=1 - scores)).value
    assert mixed.abs() < 1e-14
    one = [loss_of(dro(**flat), batch(score=torch.where(torch.arange(N) == 4, s, 0.5))).value for s in (1.0, 0.75, 0.0)]
    assert one[1].item() == pytest.approx(one[0].item() / 2) and one[2] == -one[0] and one[0] != 0
    assert loss_of(dro(form=dict(kind="sft"), feedback=flat["feedback"]), batch(score=ones)).value == accepted
    assert loss_of(dro(form=dict(kind="sft"), feedback=flat["feedback"]), batch(score=zeros)).value == 0


@pytest.mark.parametrize("form", ["clip", "softplus", "plain", "sft"])
def test_a_batch_is_the_mean_of_its_parts(form):
    """Groups are normalised by their share of the data: no item's weight hangs on the batch that it is in."""
    whole = loss_of(moved(dro(form=dict(kind=form)))).value
    parts = [batch(n=N) for _ in range(N)]
    for i, part in enumerate(parts):
        part.x0, part.index = part.x0[i : i + 1], part.index[i : i + 1]
        part.fields = {k: v[i : i + 1] for k, v in part.fields.items()}
    objective = moved(dro(form=dict(kind=form)))
    values = [loss_of(objective, part).value for part in parts]
    assert torch.stack(values).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_groups_weigh_by_their_means():
    """Two thirds rejected; the weighted mean is that of the accepted less half that of the rejected."""
    objective = dro(form=PLAIN | dict(negative_weight=0.5))
    value = loss_of(objective).value.item()
    fields = loss_of(dro(form=PLAIN)).logs  # one batch: no forgetting yet
    assert value == pytest.approx((fields["err_w"] - 0.5 * fields["err_l"]).item(), rel=1e-6)
    capped = loss_of(dro(form=PLAIN, feedback=dict(kind="scores", max_weight=2))).value.item()
    assert capped == pytest.approx((2 / 3 * fields["err_w"] - fields["err_l"]).item(), rel=1e-6)


def test_noise_is_one_for_student_and_reference_and_one_a_sample_of_a_pair():
    seen = {}

    class Record(Net):
        def forward(self, x, t, **condition):
            seen.setdefault(len(seen), (x.detach().clone(), t.clone()))
            return super().forward(x, t)

    for same, objective in ((True, dpo(student(net=Record()))), (False, dro(student(net=Record()), **PAIRS))):
        seen.clear()
        given = batch()
        loss_of(objective, given)
        (x, t), (again, times) = seen[0], seen[1]
        assert torch.equal(x, again) and torch.equal(t, times) and torch.equal(t[:N], t[N:])
        x0 = torch.cat((given.x0, given.fields["lose"]))
        eps = (x - (1 - t.double())[:, None] * x0) / t.double()[:, None]
        assert torch.allclose(eps[:N], eps[N:], atol=1e-9) == same
    assert isinstance(dpo(student(VariancePreserving())).times, Uniform)


def test_the_plain_form_without_a_limit_spares_the_reference():
    objective = dro(form=PLAIN)
    loss = loss_of(objective)
    assert objective.reference is None and set(objective.roles) == {"student"} and "rise_w" not in loss.logs
    assert set(loss.logs) == {"err_w", "err_l"}
    assert set(dro().roles) == {"student", "reference"}


def test_accuracy_counts_both_groups():
    objective = dpo(beta=1.0, max_rise=None)
    optimizer = torch.optim.Adam(objective.student.module.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(objective)
        loss.value.backward()
        optimizer.step()
        values.append(loss.value.item())
    assert values[-1] < values[0] and loss.logs["implicit_accuracy"] > 0.8


# -- what stops a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dpo, dro, lambda **s: dro(form=dict(kind="plain"), **s)])
def test_losing_the_preferred_samples_stops_a_run(make):
    with pytest.raises(DivergedError, match=r"preferred samples is .* times the reference's, more than 1 \+ max_rise"):
        loss_of(moved(make(), 3.0))
    loss_of(moved(dpo(max_rise=None), 3.0))


@pytest.mark.parametrize(
    "objective, fields, text",
    [
        (dpo, {"lose": None}, r"not the field 'lose'.*data.name=preferences"),
        (dpo, {"lose": torch.zeros(N, 3)}, r"rejected samples have shape \(3,\), preferred ones \(2,\)"),
        (lambda: dro(**PAIRS), {"lose": None}, "not the field 'lose'"),
        (dro, {"score": None}, "not the field 'score'.*data.name=feedback"),
        (dro, {"score": torch.full((N,), 5.2)}, r"accepted is 0 \(rejected\) to 1 \(accepted\)"),
        (dro, {"share": None}, "max_weight=10 balances .* 'share', which the data does not give"),
    ],
)
def test_bad_data(objective, fields, text):
    given = batch()
    given.fields = {k: v for k, v in (given.fields | fields).items() if v is not None}
    with pytest.raises(ValueError, match=text):
        loss_of(objective(), given)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(form=dict(kind="clip", kappa=1.0)), "kappa"),
        (dict(form=dict(kind="sft", negative_weight=0.5)), "negative_weight"),
        (dict(form=dict(kind="plain", beta=2)), "beta"),
        (dict(form=dict(kind="plain", negative_weight=1.5)), "negative_weight"),
        (dict(feedback=dict(kind="pairs", max_weight=2)), "max_weight"),
        (dict(feedback=dict(kind="scores", max_weight=0.5)), "max_weight"),
        (dict(form=dict(kind="hinge")), "clip.*softplus.*plain.*sft"),
    ],
)
def test_settings_without_effect_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        DRO.Config(**settings)


PAIRED_DRO = dict(name="dro", form=dict(kind="softplus"), feedback=dict(kind="pairs"))
UNPAIRED = dict(name="dro", feedback=dict(kind="scores", max_weight=1))


@pytest.mark.parametrize(
    "kind, objective, mixed_precision",
    [
        ("sd15", dict(name="diffusion_dpo"), "no"),
        ("sdxl", dict(name="diffusion_dpo"), "bf16"),
        ("sd3", UNPAIRED, "bf16"),
        ("flux", PAIRED_DRO, "no"),
    ],
)
def test_a_lora_of_every_architecture(kind, objective, mixed_precision, toys, tmp_path):
    """Three updates from synthetic data; the file loads in Diffusers, and is the student."""
    tiny.pipeline(kind).save_pretrained(tmp_path / "base")
    fields = {"lose": dict(shape=(4, 16, 16)), "score": dict(high=2)}
    trainer = toys.digits(
        tmp_path / "run",
        model=dict(pretrained=str(tmp_path / "base")),
        objective=objective,
        data=dict(name="synthetic", shape=(4, 16, 16), prompts=True, fields=fields),
        adapter=dict(kind="lora", rank=2, alpha=4),
        mixed_precision=mixed_precision,
        lr_warmup_steps=0,
        global_batch_size=2,
        max_train_steps=3,
        checkpointing_steps=3,
        logging_steps=1,
    )
    toys.run(trainer)
    first, *_, last = logs.read(tmp_path / "run" / logs.FILE)
    assert abs(first["rise_w"]) == 0 and last["rise_w"] != 0  # also in bf16: the same kernels on the same weights
    pipe = tiny.pipeline(kind)
    pipe.load_lora_weights(export(trainer))
    ours = from_pipeline(pipe)
    with trainer.averaged(), torch.no_grad():
        x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.6])
        condition = ours.encode(pipe, prompt=["a cat"])
        student = trainer.run.student(x, t, condition).velocity
        torch.testing.assert_close(ours(x, t, condition).velocity, student, rtol=0, atol=1e-5)


def test_pictures_of_both_are_encoded(toys, tmp_path):
    """By the model's autoencoder, each with noise of its own; latents are left as they are."""
    base = tmp_path / "sd3"
    tiny.pipeline("sd3").save_pretrained(base)
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(4):
        pixels = np.random.default_rng(i // 2).integers(0, 256, (32, 32, 3), dtype=np.uint8)  # two of each
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"prompt {i // 2}", "score": i % 2}))
    (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(lines))
    samples = dict(name="image_folder", path=str(tmp_path / "pictures"), size=32)
    values = dict(
        model=dict(pretrained=str(base)),
        adapter=dict(kind="lora", rank=2),
        objective=dict(name="diffusion_dpo"),
        data=dict(name="preferences", samples=samples),
        global_batch_size=2,
    )
    run = build(TrainConfig(**toys.settings(tmp_path / "run", **values)).check())
    read = run.source.__getitems__([0, 1]) | {"index": torch.arange(2)}
    given = run.inputs(read, torch.device("cpu"))
    assert given.x0.shape == given.fields["lose"].shape == (2, 4, 16, 16)
    posterior = run.pipe.vae.encode(read["lose"]).latent_dist
    config = run.pipe.vae.config
    noise = (given.fields["lose"] / config.scaling_factor + config.shift_factor - posterior.mean) / posterior.std
    assert noise.std().item() == pytest.approx(1, abs=0.05) and torch.equal(read["x0"], read["lose"])
    other = (given.x0 / config.scaling_factor + config.shift_factor - posterior.mean) / posterior.std
    correlation = torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]
    assert abs(correlation.item()) < 0.1
    assert loss_of(run.objective, given).value.item() == pytest.approx(math.log(2), abs=1e-6)
