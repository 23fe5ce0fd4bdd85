"""Samples of a masked autoregressive network: order, counts, guidance, annealed steps, and their randomness."""

import math
import re

import pytest
import torch
from torch import nn

from genkit import data
from genkit.gaussian_chain import GaussianChain
from genkit.masked_autoregressive import MARSampling, MaskedAutoregressive, reveal_counts
from genkit.networks.mar import MAR
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer

SMALL = dict(hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2, dropout=0.1)
FEW = dict(max_timestep=950, num_inference_steps=4)


def student(**changes) -> MaskedAutoregressive:
    torch.manual_seed(0)
    network = MAR(**SMALL | changes).double()
    for weight in (network.head.out.weight, network.head.modulation.weight):
        nn.init.normal_(weight, std=0.05)
    return MaskedAutoregressive(network.eval())


@pytest.fixture
def model():
    return student()


def labels(model, n):
    return model.encode(None, class_labels=torch.arange(n) % 10)


def test_64_steps_on_256_tokens():
    counts = reveal_counts(256, 64)
    assert sum(counts) == 256 and counts[:6] == [1] * 6 and counts[-4:] == [7, 6, 6, 6]
    known = torch.tensor(counts).cumsum(0) / 256
    scales = [MARSampling(guidance_scale=2.9).guidance(s) for s in known.tolist()]
    assert [scales[k] for k in (0, 31, 62, 63)] == pytest.approx([1.0074, 1.5566, 2.8555, 2.9], abs=5e-5)
    assert MARSampling(guidance_scale=2.9).guidance(255 / 256) == pytest.approx(2.8926, abs=5e-5)
    assert MARSampling(guidance_scale=2.9, guidance_schedule="constant").guidance(0.1) == 2.9


@pytest.mark.parametrize("length", [1, 2, 3, 4, 16, 36, 64, 256])
def test_every_step_draws_a_token_and_all_are_drawn(length):
    for steps in range(1, length + 1):
        counts = reveal_counts(length, steps)
        assert len(counts) == steps and min(counts) >= 1 and sum(counts) == length
    assert reveal_counts(length, 1) == [length]


def test_tokens_are_patches_channel_first():
    x = torch.arange(2 * 2 * 4 * 4).view(2, 2, 4, 4)
    model = student(sample_size=4, in_channels=2)
    tokens = model.tokens(x)
    assert tokens.shape == (2, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(model.samples(tokens), x)
    digits = data.make("digits").__getitems__(range(4))["x0"]
    assert torch.equal(student().samples(student().tokens(digits)), digits)


def record(model, monkeypatch):
    """What the transformer and the head are asked in a run."""
    asked = {"visible": [], "tokens": [], "labels": [], "x": [], "timestep": []}
    forward, head = model.network.forward, model.network.head.forward

    def transformer(tokens, visible, class_labels):
        asked["visible"].append(visible)
        asked["tokens"].append(tokens)
        asked["labels"].append(class_labels)
        return forward(tokens, visible, class_labels)

    def heads(x, timestep, z):
        asked["x"].append(x)
        asked["timestep"].append(int(timestep))
        return head(x, timestep, z)

    monkeypatch.setattr(model.network, "forward", transformer)
    monkeypatch.setattr(model.network.head, "forward", heads)
    return asked


def test_what_was_drawn_stays_and_is_seen_by_what_follows(model, monkeypatch):
    asked = record(model, monkeypatch)
    out = model.sample(ItemRNG(0, range(3)), labels(model, 3), MARSampling(**FEW, num_ar_steps=5))
    counts = reveal_counts(16, 5)
    assert [v.shape[1] for v in asked["visible"]] == [sum(counts[:k]) for k in range(5)]
    final = model.tokens(out)
    for visible, tokens in zip(asked["visible"], asked["tokens"], strict=True):
        index = visible[..., None].expand(-1, -1, 4)
        assert torch.equal(tokens.gather(1, index), final.gather(1, index))
        assert all(len(set(row)) == len(row) for row in visible.tolist())
    orders = asked["visible"][-1].tolist()
    assert orders[0] != orders[1] != orders[2]  # each sample has its own
    assert asked["timestep"] == sorted(GaussianChain(4, 950).timesteps, reverse=True) * 5
    assert out.dtype == torch.float64 and out.shape == (3, 1, 8, 8) and not out.requires_grad


def test_counts(model):
    settings = MARSampling(StepAnnealer(6, 2), num_ar_steps=5, max_timestep=950)
    model.sample(ItemRNG(0, range(3)), labels(model, 3), settings)
    calls = [len(GaussianChain(count, 950)) for count in settings.head_steps(5)]
    evaluations = sum(t * n for t, n in zip(calls, reveal_counts(16, 5), strict=True))
    assert (model.calls, model.head_calls, model.head_evaluations) == (5, sum(calls), evaluations)
    guided = student()
    guided.sample(
        ItemRNG(0, range(3)), labels(model, 3), MARSampling(StepAnnealer(6, 2), 5, guidance_scale=2.0, max_timestep=950)
    )
    assert (guided.calls, guided.head_calls, guided.head_evaluations) == (10, sum(calls), 2 * evaluations)


def test_a_budget_is_for_all_tokens(model):
    """Of 16 tokens in 5 steps, by default one a step."""
    condition, state = labels(model, 2), dict(max_timestep=999)
    for num_ar_steps in (5, None):
        before = model.head_calls
        budget = MARSampling(StepAnnealer(budget=90), num_ar_steps, **state)
        out = model.sample(ItemRNG(0, range(2)), condition, budget)
        hi, lo = StepAnnealer(budget=90).ends(num_ar_steps or 16)
        assert 90 - (num_ar_steps or 16) < model.head_calls - before <= 90
        named = MARSampling(StepAnnealer(hi, lo), num_ar_steps, **state)
        assert torch.equal(model.sample(ItemRNG(0, range(2)), condition, named), out)


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_stage"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_annealing_from_a_number_to_itself_is_constant_bit_for_bit(kind, guidance_scale, model):
    rng, condition = lambda: ItemRNG(4, range(3)), labels(model, 3)
    settings = dict(num_ar_steps=6, guidance_scale=guidance_scale)
    constant = model.sample(rng(), condition, MARSampling(7, **settings))
    assert torch.equal(model.sample(rng(), condition, MARSampling(StepAnnealer(7, 7, kind), **settings)), constant)
    assert not torch.equal(model.sample(rng(), condition, MARSampling(StepAnnealer(7, 6, kind), **settings)), constant)


def test_a_sample_is_a_function_of_its_seed_and_number(model):
    condition, state = labels(model, 5), torch.get_rng_state()
    settings = MARSampling(**FEW, guidance_scale=2.0)
    together = model.sample(ItemRNG(7, range(5)), condition, settings)
    alone = model.sample(ItemRNG(7, [3]), condition.index([3]), settings)
    torch.testing.assert_close(alone, together[3:4], rtol=1e-12, atol=1e-12)
    model.network.train()  # its dropout is off while it draws
    assert torch.equal(model.sample(ItemRNG(7, range(5)), condition, settings), together) and model.network.training
    assert torch.equal(torch.get_rng_state(), state)
    other = model.sample(ItemRNG(8, range(5)), condition, settings)
    assert not torch.isclose(other, together).any()


def test_guidance_extrapolates_the_noise_on_the_same_noisy_tokens(model, monkeypatch):
    """By hand: the last step of a run with one token set, all else known."""
    asked = record(model, monkeypatch)
    condition, scale = labels(model, 2), 3.0
    settings = MARSampling(**FEW, num_ar_steps=1, guidance_scale=scale)
    out = model.sample(ItemRNG(0, range(2)), condition, settings)
    assert asked["labels"][0].tolist() == [0, 1, 10, 10] and all(torch.equal(*x) for x in asked["x"])
    rng, chain = ItemRNG(0, range(2)), GaussianChain(4, 950)
    order = rng.uniform((16,), dtype=torch.float64).argsort(1)
    nothing = torch.zeros(2, 16, 4, dtype=torch.float64)
    z = [
        model.network(nothing, order[:, :0], c["class_labels"]).gather(1, order[..., None].expand(-1, -1, 16))
        for c in (condition, condition.null())
    ]
    x = rng.normal((16, 4), dtype=torch.float64)
    for j in (3, 2, 1, 0):
        t = torch.tensor(chain.timesteps[j])
        (conditional, logits), (unconditional, _) = (model.network.head(x, t, part) for part in z)
        epsilon = unconditional + scale * (conditional - unconditional)
        before = chain.abar[j - 1] if j else torch.tensor(1.0)
        beta, abar = chain.beta[j], chain.abar[j]
        clean = (x - (1 - abar).sqrt() * epsilon) / abar.sqrt()
        # The posterior's mean, written with the clean sample.
        x = (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x) / (1 - abar)
        if j:
            r = (logits + 1) / 2
            variance = beta**r * (beta * (1 - before) / (1 - abar)) ** (1 - r)
            x = x + variance.sqrt() * rng.normal((16, 4), dtype=torch.float64)
    tokens = torch.zeros_like(nothing).scatter(1, order[..., None].expand(-1, -1, 4), x)
    torch.testing.assert_close(out, model.samples(tokens), rtol=1e-9, atol=1e-9)


def test_no_guidance_costs_no_second_branch_and_is_what_a_scale_of_one_means(model, monkeypatch):
    condition = labels(model, 2)
    near = model.sample(ItemRNG(0, range(2)), condition, MARSampling(**FEW, guidance_scale=1 + 1e-13))
    asked = record(model, monkeypatch)
    out = model.sample(ItemRNG(0, range(2)), condition, MARSampling(**FEW))
    assert {len(v) for v in asked["labels"]} == {2} and {len(x) for x in asked["x"]} == {1}
    torch.testing.assert_close(out, near, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("num_ar_steps", [1, 16])
def test_the_fewest_and_the_most_steps(steps, num_ar_steps, model):
    out = model.sample(ItemRNG(0, [1]), labels(model, 1), MARSampling(steps, num_ar_steps))
    assert out.isfinite().all() and model.head_calls == steps * num_ar_steps


def test_half_precision_draws_in_float32(model):
    model.network.to(torch.bfloat16)
    model.network.head.float()
    out = model.sample(ItemRNG(0, range(2)), labels(model, 2), MARSampling(5))
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_as_training_draws(model):
    condition = labels(model, 2)
    out = model.draw(ItemRNG(0, range(2)), condition, 3)
    assert out.dtype == torch.float32 and model.takes_steps and model.head_calls == 3 * 16
    torch.testing.assert_close(out, model.sample(ItemRNG(0, range(2)), condition, MARSampling(3)).float())
    assert MaskedAutoregressive(model.network).shape == (1, 8, 8) and model.num_classes == 10


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(num_ar_steps=17), "num_ar_steps=17: accepted are 1 to 16, the number of tokens"),
        (dict(num_ar_steps=0), "num_ar_steps=0: accepted are 1 to 16"),
        (dict(num_inference_steps=0), "num_inference_steps=0: accepted are 1 to 1000"),
        (dict(num_inference_steps="linear"), "num_inference_steps='linear': must be an integer"),
        (dict(num_ar_steps=2.5), "num_ar_steps=2.5: must be an integer"),
        (
            dict(num_inference_steps=StepAnnealer(2000, 5)),
            "num_inference_steps=linear:hi=2000,lo=5: accepted are 1 to 1000",
        ),
        (
            dict(num_inference_steps=StepAnnealer(budget=79)),
            "budget=79: 16 steps of at least lo=5 take 80",
        ),
        (
            dict(num_inference_steps=StepAnnealer(budget=20_000)),
            "num_inference_steps=linear:budget=20000,lo=5: the first of 16 autoregressive steps would take 2495",
        ),
        (dict(max_timestep=1000), "max_timestep=1000"),
        (dict(guidance_scale=-1.0), "guidance_scale=-1.0: must be a number of at least 0"),
        (dict(guidance_scale=math.nan), "guidance_scale=nan"),
        (dict(guidance_schedule="cosine"), "guidance_schedule='cosine': accepted are linear, constant"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=math.inf), "temperature=inf"),
    ],
)
def test_bad_settings(settings, text, model):
    with pytest.raises(ValueError, match=re.escape(text)):
        model.sample(ItemRNG(0, [0]), labels(model, 1), MARSampling(**settings))
    assert model.calls == 0


@pytest.mark.parametrize("wrong", [[], [10], [-1]])
def test_labels_out_of_range(wrong, model):
    with pytest.raises(ValueError, match="accepted are 0 to 9"):
        model.encode(None, class_labels=wrong)
