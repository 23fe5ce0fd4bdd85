"""Gradient-free classifier guidance: the specification's figures in float64, and its rules."""

import diffusers
import pytest
import torch
from torch import nn

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.guidance import CFG, Point
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.gfcg import GFCG, SCALE_RULES, reference_class
from genkit.interpolants import Linear
from genkit.sampling import sample
from genkit.testing.oracles import GaussianMixture

F64 = torch.float64
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=F64)
FAR = GaussianMixture(MEANS, 0.3**0.5, labels=[0, 1, 2])
NEAR = GaussianMixture(MEANS / 2, 0.3**0.5, labels=[0, 1, 2])
T = torch.tensor(0.5, dtype=F64)


def posterior(law, x, t):
    """``p(class | x_t = x)`` ``(B, 3)``."""
    labels = range(3)
    logs = [law.log_density(x.double(), t, torch.full((len(x),), k)) for k in labels]
    return torch.stack(logs, 1).softmax(1)


def judge(x):
    """The exact classifier of clean samples, as logits."""
    return posterior(NEAR, x, torch.zeros((), dtype=F64)).log()


def labels(y):
    y = torch.as_tensor(y)
    return Condition({"class_labels": y}, {"class_labels": torch.full_like(y, 3)})


def points(n=6, seed=0):
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def at(guider, x, y, denoiser=None, t=T):
    denoiser = denoiser or NEAR.denoiser()
    guider.start_run()
    guided, state = guider.evaluate(Point(denoiser, x, t, None, None, labels(y)), None)
    return guided, state


def made(**settings):
    given = {k: settings.pop(k) for k in list(settings) if k in GFCG.takes and callable(settings[k])}
    return GFCG(**settings).using(**{"classifier": judge} | given)


# -- the specification's figures ------------------------------------------------------------------------------------


def test_reference_classes():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.34, 0.33, 0.33]], dtype=F64)
    assert reference_class(p, torch.zeros(3, dtype=torch.int64)).tolist() == [1, 2, 1]
    assert reference_class(torch.tensor([[0.25] * 4]), torch.tensor([0])).tolist() == [1]


def test_the_push_is_the_gradient_of_the_log_odds():
    x = torch.tensor([[0.4, 0.3]], dtype=F64)
    expected = torch.tensor([[0.696375, 0.251303, 0.052323]], dtype=F64)
    torch.testing.assert_close(posterior(FAR, x, T), expected, rtol=0, atol=5e-7)
    place = x.clone().requires_grad_()
    p = posterior(FAR, place, T)
    (gradient,) = torch.autograd.grad((p[0, 0] / p[0, 1]).log(), place)
    torch.testing.assert_close(gradient, torch.tensor([[4.615385, -2.615385]], dtype=F64), rtol=0, atol=5e-7)
    guider = GFCG(scale_rule="constant", strength=1.0).using(classifier=lambda z: posterior(FAR, z, T * 0).log())
    got, _ = at(guider, x, [0], FAR.denoiser("sample"))
    push = (0.5 / 0.25) * (got.prediction.sample - got.parts["cond"].sample)
    torch.testing.assert_close(push, gradient, rtol=0, atol=1e-14)
    assert guider.stats()["reference"].tolist() == [[1]]


def test_strength_zero_is_the_condition_bit_for_bit():
    x, y, denoiser = points(), [0, 1, 2, 0, 1, 2], NEAR.denoiser()
    plain = denoiser(x, T, labels(y)).raw
    calls = denoiser.calls
    assert torch.equal(at(made(strength=0.0), x, y, denoiser)[0].prediction.raw, plain)
    assert denoiser.calls == calls + 1
    off = at(made(strength=0.0, scale_rule=lambda p, d, r, t: torch.ones(len(p))), x, y, denoiser)
    assert torch.equal(off[0].prediction.raw, plain)


@pytest.mark.parametrize("w", [1.5, 4.0])
def test_with_the_null_condition_and_a_constant_scale_it_is_cfg(w):
    x, y = points(), [0, 1, 2, 0, 1, 2]
    got, _ = at(made(reference="null", scale_rule="constant", strength=w - 1), x, y)
    expected, _ = at(CFG(guidance_scale=w), x, y)
    torch.testing.assert_close(got.prediction.raw, expected.prediction.raw, rtol=1e-13, atol=1e-13)


def test_against_the_desired_class_of_a_weaker_network_it_is_autoguidance():
    x, y, weak = points(), [0, 1, 2, 0, 1, 2], FAR.denoiser()
    guider = made(mode="autoguidance", scale_rule="constant", strength=1.5, choose=lambda p, d: d).using(weak=weak)
    got, _ = at(guider, x, y)
    expected, _ = at(Autoguidance(guidance_scale=2.5).using(weak=weak), x, y)
    torch.testing.assert_close(got.prediction.raw, expected.prediction.raw, rtol=1e-13, atol=1e-13)
    assert guider.stats()["network_calls"].tolist() == [2]


def test_the_share_of_the_desired_class_grows_with_the_strength():
    """Means halved, linear path, Euler 100, 4000 samples, alone, default rule."""
    shares, spreads = [], []
    for strength in (0.0, 0.5, 1.0, 2.0, 4.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - k / 100 for k in range(100)])
        x = sample(NEAR.denoiser(), scheduler, points(4000), labels([0] * 4000), guider=made(strength=strength))
        shares.append((judge(x).argmax(1) == 0).double().mean().item())
        spreads.append(x[:, 0].std().item())
    assert shares == pytest.approx([0.910, 0.950, 0.984, 1.000, 1.000], abs=0.015)
    assert shares == sorted(shares) and spreads == sorted(spreads, reverse=True)
    assert (spreads[0], spreads[-1]) == pytest.approx((0.541, 0.403), abs=0.015)


# -- the rule -------------------------------------------------------------------------------------------------------


def parts_of(x, y, t=T):
    """Predictions for the desired and the runner-up class and the null one, and the classifier's probabilities."""
    y = torch.as_tensor(y)
    denoiser = NEAR.denoiser()
    cond, null = denoiser.many(x, t, [labels(y), labels(y).null()])
    p = judge(cond.sample).softmax(1)
    r = reference_class(p, y)
    reference = denoiser(x, t, Condition({"class_labels": r}))
    pick = lambda k: p.gather(1, k[:, None])[:, 0]  # noqa: E731
    return cond.raw, reference.raw, null.raw, pick(y), pick(r), r


Y = [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_scale_rules(rule):
    x = points()
    cond, reference, _, p, q, r = parts_of(x, Y)
    scale = {
        "one_minus_desired": 1 + 2 * (1 - p),
        "relative_confusion": 1 + 2 * q / (q + p),
        "constant": 3 * torch.ones(6),
    }[rule]
    guider = made(scale_rule=rule, strength=2.0)
    got, _ = at(guider, x, Y)
    expected = cond + (scale - 1)[:, None] * (cond - reference)
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-12, atol=1e-12)
    stats = guider.stats()
    torch.testing.assert_close(stats["scale"][0], scale.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats["p_desired"][0], p, rtol=1e-12, atol=1e-12)
    assert stats["reference"][0].tolist() == r.tolist() and stats["network_calls"].tolist() == [2]


def test_a_scale_rule_and_a_choice_of_ones_own():
    x, seen = points(), []

    def scale_rule(p, desired, reference, t):
        seen.append((p.shape, desired.tolist(), reference.tolist(), float(t)))
        return 1 + t * torch.arange(6)

    guider = made(scale_rule=scale_rule, choose=lambda p, d: (d + 1) % 3)
    got, _ = at(guider, x, Y)
    other = [(y + 1) % 3 for y in Y]
    assert seen == [((6, 3), Y, other, 0.5)]
    cond, reference = (NEAR.denoiser()(x, T, labels(k)).raw for k in (Y, other))
    expected = cond + 0.5 * torch.arange(6)[:, None] * (cond - reference)
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-12, atol=1e-12)


def test_added_to_cfg():
    x = points()
    cond, reference, null, p, _, _ = parts_of(x, Y)
    guider = made(mode="cfg_add", guidance_scale=2.5, strength=2.0)
    got, _ = at(guider, x, Y)
    expected = cond + 1.5 * (cond - null) + (2 * (1 - p))[:, None] * (cond - reference)
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-12, atol=1e-12)
    assert guider.stats()["network_calls"].tolist() == [3] and set(got.parts) == {"cond", "uncond", "reference"}


def test_switched_with_cfg_sample_by_sample():
    x = points()
    cond, reference, null, p, _, r = parts_of(x, Y)
    tau = p.sort().values[2:4].mean().item()
    guider = made(mode="cfg_switch", guidance_scale=2.5, strength=2.0, tau=tau)
    got, _ = at(guider, x, Y)
    sure = (p >= tau)[:, None]
    assert 0 < sure.sum() < 6
    expected = torch.where(sure, cond + 1.5 * (cond - null), cond + (2 * (1 - p))[:, None] * (cond - reference))
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-12, atol=1e-12)
    stats = guider.stats()
    assert stats["network_calls"].tolist() == [2]
    assert stats["reference"][0].tolist() == torch.where(sure[:, 0], -1, r).tolist()


@pytest.mark.parametrize("mode", ["alone", "cfg_add", "cfg_switch"])
def test_outside_the_classifiers_window_it_is_cfg(mode):
    x = points()
    guider = made(mode=mode, guidance_scale=2.5, classify_start=0.2, classify_stop=0.4)
    for t, calls in ((0.9, 2), (0.5, 2)):
        got, _ = at(guider, x, Y, t=torch.tensor(t, dtype=F64))
        expected, _ = at(CFG(guidance_scale=2.5), x, Y, t=torch.tensor(t, dtype=F64))
        torch.testing.assert_close(got.prediction.raw, expected.prediction.raw, rtol=1e-12, atol=1e-12)
        assert guider.stats()["network_calls"].tolist() == [calls]
        assert guider.stats()["reference"].tolist() == [[-1] * 6]
    plain, _ = at(guider.new(guidance_scale=1.0), x, Y)
    assert torch.equal(plain.prediction.raw, plain.parts["cond"].raw)  # no null condition was asked for
    inside, _ = at(guider, x, Y, t=torch.tensor(0.7, dtype=F64))
    assert "reference" in inside.parts and guider.stats()["p_desired"].isfinite().all()


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_an_answer_that_is_not_finite_falls_back_for_that_sample_alone(w):
    x = points()

    def sick(images):
        logits = judge(images)
        logits[2] = torch.nan
        return logits

    guider = made(guidance_scale=w, classifier=sick, strength=2.0)
    got, _ = at(guider, x, Y)
    healthy, _ = at(made(strength=2.0), x, Y)
    cfg, _ = at(CFG(guidance_scale=w), x, Y)
    expected = healthy.prediction.raw.clone()
    expected[2] = cfg.prediction.raw[2]
    torch.testing.assert_close(got.prediction.raw, expected, rtol=1e-12, atol=1e-12)
    assert guider.stats()["reference"][0, 2] == -1


def test_one_class_is_guided_by_the_null_condition():
    law = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64), 0.5, labels=[0, 1])
    y = Condition({"class_labels": torch.zeros(3, dtype=torch.int64)}, {"class_labels": torch.full((3,), 2)})
    ids = Condition({"class_labels": torch.tensor([0])})
    guider = GFCG(guidance_scale=2.0).using(classifier=lambda x: x[:, :1], candidates=ids)
    where = Point(law.denoiser(), points(3), T, None, None, y)
    got, expected = (g.guide(where, None)[0].prediction.raw for g in (guider, CFG(guidance_scale=2.0)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_sure_classifier_costs_no_second_call():
    denoiser = NEAR.denoiser()
    sure = lambda x: 1e4 * nn.functional.one_hot(torch.tensor(Y[: len(x)]), 3).double()  # noqa: E731
    got, _ = at(made(classifier=sure, strength=3.0), points(), Y, denoiser)
    assert denoiser.calls == 1 and torch.equal(got.prediction.raw, got.parts["cond"].raw)


def test_classified_once_a_time_and_every_so_many_times():
    seen = []

    def counting(x):
        seen.append(len(x))
        return judge(x)

    for every, expected in ((1, 4), (2, 2), (3, 2)):
        guider, state = made(classifier=counting, classify_every=every), None
        seen.clear()
        for t in (0.9, 0.7, 0.7, 0.5, 0.3):  # a solver of second order asks twice at one time
            place = Point(NEAR.denoiser(), points(), torch.tensor(t, dtype=F64), None, None, labels(Y))
            _, state = guider.guide(place, state)
        assert len(seen) == expected
    index = torch.tensor([5, 0])
    moved = state.gather(index)
    assert torch.equal(moved.p, state.p[index]) and moved.rows.tolist() == [5, 0] and moved.age == state.age == 0


def test_the_temperature_flattens():
    x = points()
    cold, hot = (made(temperature=v) for v in (1.0, 50.0))
    for guider in (cold, hot):
        at(guider, x, Y)
    cond = NEAR.denoiser()(x, T, labels(Y))
    expected = (judge(cond.sample) / 50).softmax(1).gather(1, torch.tensor(Y)[:, None])[:, 0]
    torch.testing.assert_close(hot.stats()["p_desired"][0], expected, rtol=1e-12, atol=1e-12)


def test_a_classifier_that_numbers_classes_otherwise():
    """Its class ``k`` is the label ``ids[k]``."""
    ids = torch.tensor([2, 0, 1])
    x = points()
    guider = made(strength=2.0, classifier=lambda z: judge(z)[:, ids])
    guider = guider.using(candidates=Condition({"class_labels": ids}))
    got, _ = at(guider, x, Y)
    expected, _ = at(made(strength=2.0), x, Y)
    torch.testing.assert_close(got.prediction.raw, expected.prediction.raw, rtol=1e-12, atol=1e-12)


def test_desired_rows_follow_their_samples():
    shifts = torch.randn(3, 2, dtype=F64)
    denoiser = FunctionDenoiser(lambda x, t, shift: torch.tanh(x + shift), Linear(), "flow_prediction")
    candidates = Condition({"shift": shifts})
    guider = made(strength=3.0).using(classifier=judge, candidates=candidates, desired=torch.tensor([0, 1, 2, 0]))
    x, cond = points(4), Condition({"shift": shifts[[0, 1, 2, 0]]})
    whole, state = guider.guide(Point(denoiser, x, T, None, None, cond), None)
    index = torch.tensor([2, 2, 1])
    t = torch.tensor(0.4, dtype=F64)
    full, _ = guider.guide(Point(denoiser, x, t, None, None, cond), state)
    part, _ = guider.guide(Point(denoiser, x[index], t, None, None, cond.index(index)), state.gather(index))
    torch.testing.assert_close(part.prediction.raw, full.prediction.raw[index], rtol=1e-12, atol=1e-12)
