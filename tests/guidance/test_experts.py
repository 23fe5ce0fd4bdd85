"""Several models or conditions as one guider: the score sum, what is asked of which network, refusals, saving."""

import math

import pytest
import torch

from genkit.denoisers import Condition
from genkit.guidance import CFG
from genkit.guidance.base import Point
from genkit.guidance.experts import Experts
from genkit.interpolants import Trigonometric
from genkit.sampling import sample
from genkit.testing.oracles import Gaussian, two_class_mixture
from tests.feynman_kac.targets import F64, NARROW, UNIT, grid, scheduler_on

LAW = two_class_mixture(3)


def labels(*classes):
    y = torch.tensor(classes)
    return Condition({"class_labels": y}, {"class_labels": torch.full_like(y, LAW.num_classes)})


def point(denoiser, x, condition=None, t=0.6):
    return Point(denoiser, x, torch.tensor(t, dtype=F64), None, None, condition or Condition())


@pytest.mark.parametrize(
    "kinds", [("flow_prediction", "flow_prediction"), ("epsilon", "sample"), ("v_prediction",) * 2]
)
def test_the_score_sum(kinds):
    """``B (D - y)/kappa^2`` is the sum of the oracles' scores with their exponents, whatever networks predict."""
    x = torch.randn(5, 1, dtype=F64)
    guider = Experts(exponents={"cond": 1.5, "b": 0.7}).using(experts={"b": NARROW.denoiser(kinds[1])})
    guided, _ = guider.guide(point(UNIT.denoiser(kinds[0]), x), None)
    t = torch.tensor(0.6, dtype=F64)
    torch.testing.assert_close(2.2 * guided.prediction.score, 1.5 * UNIT.score(x, t) + 0.7 * NARROW.score(x, t))
    assert list(guided.parts) == ["cond", "b"]


def test_conditions_of_one_model_go_through_it_in_one_batch():
    x = torch.randn(4, 3, dtype=F64)
    denoiser, other = LAW.denoiser(), LAW.denoiser()
    guider = Experts(exponents={"cond": 1.0, "uncond": -0.5, "one": 0.5, "both": 1.0, "off": 0.0}).using(
        experts={"one": labels(1, 1, 1, 1), "both": (other, labels(1, 0, 1, 0)), "off": other}
    )
    batches = []
    network = denoiser.network
    denoiser.network = lambda z, t, **c: batches.append(len(z)) or network(z, t, **c)
    guider.check((4, 3), labels(0, 0, 0, 0))
    guided, _ = guider.guide(point(denoiser, x, labels(0, 0, 0, 0)), None)
    assert batches == [12] and denoiser.calls == 4 and set(guided.parts) == {"cond", "uncond", "one", "both"}
    t = torch.tensor(0.6, dtype=F64)
    v = {
        name: LAW.velocity(x, t, torch.tensor(y)) for name, y in {"c": [0] * 4, "1": [1] * 4, "b": [1, 0, 1, 0]}.items()
    }
    expected = (v["c"] - 0.5 * LAW.velocity(x, t) + 0.5 * v["1"] + v["b"]) / 2
    torch.testing.assert_close(guided.prediction.raw, expected)


def test_as_guidance():
    x, given = torch.randn(4, 3, dtype=F64), labels(0, 1, 1, 0)
    experts = Experts(exponents={"cond": 3.0, "uncond": -2.0})
    pair = [
        g.guide(point(LAW.denoiser(), x, given), None)[0].prediction.raw for g in (experts, CFG(guidance_scale=3.0))
    ]
    torch.testing.assert_close(*pair)


def test_neutral_costs_one_call():
    denoiser = LAW.denoiser()
    guider = Experts(exponents={"cond": 1.0, "uncond": 0.0})
    assert guider.neutral and not guider.needs_uncond
    x = torch.randn(2, 3, dtype=F64)
    guided, _ = guider.guide(point(denoiser, x, Condition({"class_labels": torch.tensor([0, 1])})), None)
    assert denoiser.calls == 1 and list(guided.parts) == ["cond"]


def test_saved_and_loaded(tmp_path):
    guider = Experts(exponents={"cond": 1.0, "b": 0.5})
    guider.save_pretrained(tmp_path)
    again = Experts.from_pretrained(tmp_path)
    assert again.exponents == guider.exponents and again.config.exponents == {"cond": 1.0, "b": 0.5}


@pytest.mark.parametrize("exponents", [{"cond": -1.0}, {"cond": 1.0, "b": -1.0}, {"cond": math.nan}, {}])
def test_exponents_without_a_start(exponents):
    with pytest.raises(ValueError, match="exponents="):
        Experts(exponents=exponents)


def test_refusals_before_the_first_call():
    denoiser, x = UNIT.denoiser(), torch.randn(4, 1, dtype=F64)
    guider = Experts(exponents={"cond": 1.0, "b": 1.0})

    def refused(guider, match):
        with pytest.raises(ValueError, match=match):
            sample(denoiser, scheduler_on(grid(steps=5), 1.0, 2.0), x, guider=guider)
        assert denoiser.calls == 0

    refused(guider, r"exponents name the experts \['b'\], and using\(experts=...\) gave \[\]")
    refused(guider.using(experts={"b": denoiser, "c": denoiser}), "they must agree")
    elsewhere = Gaussian([0.0], 1.0, interpolant=Trigonometric()).denoiser()
    refused(guider.using(experts={"b": elsewhere}), r"experts\['b'\] was made for another path \(Trigonometric\)")
    refused(guider.using(experts={"b": Condition({"y": torch.zeros(3)})}), "a condition for 3 samples, the batch has 4")
    with_null = Experts(exponents={"cond": 2.0, "uncond": -1.0})
    refused(with_null, "no unconditional branch")
