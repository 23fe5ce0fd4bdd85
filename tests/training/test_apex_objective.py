"""APEX's objectives on small networks: what each item is for, and what its loss reaches."""

import pytest
import torch
from torch import nn

from genkit import load_flow_map
from genkit.denoisers import FunctionFlowMap, from_pipeline
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training import checkpoint
from genkit.training.export import export
from genkit.training.objectives.apex import Apex, ApexConfig
from genkit.training.objectives.base import Batch
from genkit.training.validation import validate


class Branches(nn.Module):
    """A velocity with weights of its own for each sign of the condition."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.real, self.fake = (nn.Parameter(torch.randn(5, 3, generator=g, dtype=torch.float64) / 3) for _ in range(2))

    def forward(self, x, t, s, prompt_embeds):
        features = torch.cat((x, t[:, None], s[:, None]), dim=1)
        return torch.where(prompt_embeds[:, 0] > 0, features @ self.real, features @ self.fake)


def make(**settings):
    student = FunctionFlowMap(Branches(), Linear())
    loss = settings.pop("loss", {})
    loss = loss if "form" in loss else dict(form="released", guidance=None) | loss
    config = validate(ApexConfig, dict(loss=loss, condition_dropout=0) | settings, "objective")
    return Apex(config, student)


def batch(positions, condition=1.0):
    index = torch.tensor(positions)
    n = len(index)
    embeds = torch.full((n, 1, 1), condition, dtype=torch.float64)
    x0 = ItemRNG(5, index).normal((3,), dtype=torch.float64)
    return Batch(x0, Condition({"prompt_embeds": embeds}, {"prompt_embeds": -2 * embeds}), index, step=1, total_steps=2)


def loss_of(objective, positions, **settings):
    (phase,) = objective.phases(0)
    return objective(phase, batch(positions, **settings), ItemRNG(9, torch.tensor(positions)))


def gradients(objective, value):
    made = torch.autograd.grad(value, list(objective.student.network.parameters()), allow_unused=True)
    return [None if g is None else g.abs().max().item() for g in made]


@pytest.mark.parametrize(
    "loss", [{}, dict(error="mse", intervals=0), dict(form="literal"), dict(guidance=dict(guidance_scale=3.0))]
)
def test_a_batch_is_the_mean_of_its_items(loss):
    objective = make(loss=loss)
    whole = loss_of(objective, list(range(8))).value
    one_by_one = torch.stack([loss_of(objective, [i]).value for i in range(8)]).mean()
    torch.testing.assert_close(whole, one_by_one, rtol=1e-12, atol=1e-12)
    assert whole > 0


def test_every_part_gets_its_turn_and_its_branch():
    objective = make(loss=dict(dm_weight=0), shift=dict(kind="condition", a=-1))
    for position, part in enumerate(("e2e", "mul", "any", "adv")):
        loss = loss_of(objective, [position])
        real, fake = gradients(objective, loss.value)
        assert ("adversarial" in loss.logs) == (part == "adv") != ("flow" in loss.logs)
        if part == "adv":  # its sample came from the real branch, without gradients
            assert fake > 0 and not real
        else:
            assert real > 0 and not fake


def test_times_of_the_parts():
    objective = make(loss=dict(parts=["e2e", "mul", "any", "end", "adv"]), shift=dict(kind="condition", a=-1))
    calls = []
    student = objective.student
    inner = student.average_velocity

    def recording(x, t, s, condition=None):
        if torch.is_grad_enabled():
            calls.append((t, s, condition["prompt_embeds"].flatten()[0].item()))
        return inner(x, t, s, condition)

    student.average_velocity = recording
    loss_of(objective, list(range(500)))
    (adv_t, adv_s, adv_c), (t, s, c) = calls
    assert torch.equal(adv_t, adv_s) and adv_c == -c
    t, s = t.view(-1, 4), s.view(-1, 4)
    assert (t[:, 0] == 1).all() and (s[:, 0] == 0).all()
    assert (s[:, 1] >= 0.95 * t[:, 1]).all() and (s[:, 1] < t[:, 1]).all()
    ratio = s[:, 2] / t[:, 2]
    assert 0.4 < ratio.mean() < 0.6 and ratio.min() < 0.1 and ratio.max() > 0.9
    assert (s[:, 3] == 0).all() and 0.4 < t[:, 3].mean() < 0.6


def test_the_gradient_of_the_matching_term_is_the_difference_of_the_branches():
    objective = make(loss=dict(error="mse"), shift=dict(kind="condition", a=-1))
    b = batch(range(6))
    u = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    t, z, eps = ItemRNG(2, range(6)).uniform(), torch.randn_like(u), torch.randn_like(u)
    error = objective._matching(u, eps, t, z, b.condition, {})
    (gradient,) = torch.autograd.grad(error.mean(), u)
    x = (1 - t)[:, None] * (eps - u.detach()) + t[:, None] * z
    with torch.no_grad():
        net, c = objective.student.network, b.condition["prompt_embeds"]
        g = (net(x, t, t, -c) - net(x, t, t, c)).clamp(-1, 1)
    assert (g.abs() == 1).any() and (g.abs() < 1).any()
    torch.testing.assert_close(gradient, 2 * g / g.numel(), rtol=1e-6, atol=1e-9)


def test_no_shift_is_no_signal():
    objective = make(shift=dict(kind="condition", a=1.0, learned=True))
    loss = loss_of(objective, list(range(8)))
    assert loss.logs["matching"] == loss.logs["visibility"] == loss.logs["adversarial"] == 0


def test_items_with_a_condition_of_zeros_are_left_out(caplog):
    objective = make(shift=dict(kind="condition", a=-1))
    loss = loss_of(objective, list(range(8)), condition=0.0)
    assert loss.logs["matching"] == loss.logs["adversarial"] == 0 < loss.logs["flow"]
    assert "the shift moves the velocity by 0 of its mean square" in caplog.text
    with_offset = make(shift=dict(kind="condition", a=-1, b=-0.5))
    assert loss_of(with_offset, list(range(8)), condition=0.0).logs["adversarial"] > 0


def test_the_literal_objective_s_options():
    def literal(**settings):
        objective = make(loss=dict(form="literal", **settings), shift=dict(kind="condition", a=-1))
        return objective, loss_of(objective, list(range(16)))

    objective, loss = literal(mix_weight=0)
    real, fake = gradients(objective, loss.value)
    assert fake > 0 and not real  # detached
    objective, loss = literal(mix_weight=0, fake_grad=True)
    assert min(gradients(objective, loss.value)) > 0
    objective, loss = literal(fake_weight=0)
    real, fake = gradients(objective, loss.value)
    assert real > 0 and not fake
    plain, reused, ramped = (literal(**s)[1] for s in ({}, dict(fake_reuse_noise=True), dict(warmup=0.75)))
    assert reused.logs["mixed"] == plain.logs["mixed"] and reused.logs["adversarial"] != plain.logs["adversarial"]
    assert ramped.logs["adversarial"] == plain.logs["adversarial"]
    # At half of the run, two thirds of the way up.
    third = literal(mix=1 / 3)[1].logs["mixed"]
    assert ramped.logs["mixed"].item() == pytest.approx(third.item())
    expected = third + 2 / 3 * plain.logs["adversarial"]
    assert ramped.value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(loss=dict(parts=["mul", "any"])), "dm_weight=0.5 needs the parts e2e and adv, got \\['mul', 'any'\\]"),
        (dict(loss=dict(intervals=0)), "diverges with error='barron'; use error=mse, or intervals of 1 or more"),
        (dict(loss=dict(intervals=0, dm_weight=0, parts=["any"])), "intervals=0 regresses the parts mul and adv"),
        (dict(loss=dict(guidance=dict(guidance_scale=1.0))), "guidance_scale=1 teaches none; set guidance to null"),
        (dict(loss=dict(guidance=dict(guidance_scale=float("inf")))), "guidance_scale"),
        (dict(loss=dict(guidance=dict(guidance_scale=0.0))), "a frozen reference alone"),
        (dict(loss=dict(guidance=dict(low=0.5, high=0.5))), "low=0.5 must be below high=0.5"),
        (dict(loss=dict(mix=0.5)), "unknown key"),
        (dict(shift=dict(kind="condition", a=1.0)), "a=1, b=0 is no shift"),
        (dict(shift=dict(kind="condition", form="full")), "form='full' differs from scalar only with learned=true or"),
        (dict(shift=dict(kind="condition", a=-1, weights="w.safetensors")), "brings a and b"),
        (dict(shift=dict(kind="condition", form="diag", learned=True)), "the width of the condition is not known"),
        (dict(shift=dict(kind="time_sign", a=-1)), "unknown key"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_data_without_a_condition_are_refused():
    objective = make()
    rows = Batch(torch.zeros(4, 3, dtype=torch.float64), Condition(), torch.arange(4))
    objective.student.network = lambda x, t, s: -x
    with pytest.raises(ValueError, match="conditioned on nothing.*use shift.kind=time_sign"):
        objective(objective.phases(0)[0], rows, ItemRNG(0, range(4)))
    objective = make(loss=dict(guidance=dict(guidance_scale=2.0)), shift=dict(kind="time_sign"))
    objective.student.network = lambda x, t, s: -x
    with pytest.raises(ValueError, match="guidance: the samples have no condition"):
        objective(objective.phases(0)[0], rows, ItemRNG(0, range(4)))


# -- in the trainer ---------------------------------------------------------------------------------------------------


def objective(**loss):
    return dict(name="apex", loss=dict(form="released") | loss)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_run_goes_on_bit_for_bit(ema_decay, toys, tmp_path):
    """With a learned shift; with a reference that follows."""
    settings = dict(
        objective=objective(guidance=dict(guidance_scale=2.0, ema_decay=ema_decay))
        | dict(shift=dict(kind="condition", form="diag", learned=True)),
        max_train_steps=4,
        checkpointing_steps=2,
        global_batch_size=4,
    )
    whole = toys.run(toys.digits(tmp_path / "whole", **settings))
    assert whole.roles.keys() == {"student", "shift"}
    toys.run(toys.digits(tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-2"), **settings))
    for name in ("student", "shift", "objective", *(["reference"] if ema_decay else [])):
        if name == "objective" and not ema_decay:
            continue
        ours, theirs = (
            checkpoint.load_file(tmp_path / n / f"checkpoint-4/{name}.safetensors") for n in ("whole", "again")
        )
        assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    moved = checkpoint.load_file(tmp_path / "whole/checkpoint-4/shift.safetensors")["a"]
    assert (moved - -0.5).abs().max() > 1e-6


@pytest.mark.parametrize("ema_decay", [0.9, 1.0])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_low_rank_students(kind, ema_decay, toys, tmp_path):

    tiny.pipeline(kind).save_pretrained(tmp_path / "base")
    trainer = toys.digits(
        tmp_path / "run",
        model=dict(pretrained=str(tmp_path / "base")),
        data=dict(name="synthetic"),
        adapter=dict(kind="lora", rank=2, alpha=4),
        objective=objective(guidance=dict(guidance_scale=5.0, ema_decay=ema_decay)),
        lr_scheduler="constant",
        lr_warmup_steps=0,
        global_batch_size=4,
        max_train_steps=2,
    )
    names = list(trainer.roles["student"].parameters)
    assert not any(".reference." in n for n in names)
    pipe = trainer.run.pipe

    condition = from_pipeline(pipe).encode(pipe, prompt=["a", "b"], negative_prompt="")
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([0.9, 0.3])

    def output(network):
        with torch.no_grad():
            return network.average_velocity(x, t, t, condition)

    before = output(trainer.run.student)
    toys.run(trainer)
    student = trainer.run.student
    assert (output(student) - before).abs().max() > 1e-5
    with trainer.objective.reference.network() as reference:
        held = output(reference)
    assert (torch.equal(held, before)) == (ema_decay == 1)
    with trainer.averaged():
        after = output(student)
    folder = export(trainer)
    loaded = load_flow_map(type(pipe).from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(output(loaded), after, rtol=0, atol=1e-5)
