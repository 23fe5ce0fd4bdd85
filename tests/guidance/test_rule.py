"""A rule inside another guider: what it takes, what it refuses, what it tells, and which rows are whose."""

import diffusers
import pytest
import torch

from genkit.denoisers import Condition
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.base import Point
from genkit.guidance.cfg_mp import CFGMP
from genkit.guidance.gfcg import GFCG
from genkit.guidance.h_transform import HTransform
from genkit.guidance.readout import Readout
from genkit.sampling import sample
from genkit.testing.oracles import two_class_mixture
from tests.ready import GIVEN, GUIDERS, ready

F64 = torch.float64
LAW = two_class_mixture(4)
HOLDERS = [name for name, cls in GUIDERS.items() if cls().inner is not None]
every_holder = pytest.mark.parametrize("name", HOLDERS)


def labels(n=4):
    y = torch.arange(n) % 2
    return Condition({"class_labels": y}, {"class_labels": torch.full_like(y, LAW.num_classes)})


def flow(n=6):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    return scheduler


def classifier():
    return GIVEN["gfcg"]((4, 4))["classifier"]


def noise(n=4):
    return torch.randn(n, 4, dtype=F64)


def test_those_that_hold_a_rule():
    assert {GUIDERS[name] for name in HOLDERS} >= {Autoguidance, CFGMP, HTransform, Readout}


@every_holder
def test_what_the_rule_needs_is_given_to_the_guider_around_it(name):
    guider = ready(GUIDERS[name], (4, 4), rule={"name": "gfcg"})
    denoiser = LAW.denoiser()
    assert "classifier" in guider.takes and "classifier" in guider.needs and "classifier" not in type(guider).takes
    with pytest.raises(ValueError, match=rf"{type(guider).__name__} lacks 'classifier'.*using\(classifier=\.\.\.\)"):
        sample(denoiser, flow(), noise(), labels(), guider=guider)
    assert denoiser.calls == 0
    given = guider.using(classifier=classifier())
    for copy in (given, given.new(start=0.0)):  # a copy keeps it
        sample(denoiser, flow(), noise(), labels(), guider=copy)
    assert given.stats()["p_desired"].isfinite().all()
    with pytest.raises(ValueError, match="name='nothing' is not known"):
        guider.using(nothing=1)


def test_one_name_that_both_take_goes_to_both():
    weak = GIVEN["autoguidance"]((4, 4))["weak"]
    guider = Autoguidance(rule={"name": "gfcg", "mode": "autoguidance"}).using(weak=weak, classifier=classifier())
    assert guider.needs == ("weak", "classifier") and guider.inner.given("weak") is weak
    assert guider.given("classifier") is guider.inner.given("classifier")
    sample(LAW.denoiser(), flow(), noise(), labels(), guider=guider)


def test_three_deep():
    rule = {"name": "cfg_mp", "rule": {"name": "gfcg"}}
    guider = ready(HTransform, (4, 4), rule=rule).using(classifier=classifier())
    sample(LAW.denoiser(), flow(), noise(), labels(), guider=guider)
    assert guider.moves_sample
    assert {"weight", "distance", "applications", "displacement", "p_desired", "scale"} <= guider.stats().keys()


@every_holder
def test_diagnostics_of_the_rule_are_among_those_of_the_guider(name):
    guider = ready(GUIDERS[name], (4, 4), rule={"name": "apg", "guidance_scale": 3.0, "start": 0.4})
    sample(LAW.denoiser(), flow(), noise(), labels(), guider=guider)
    stats = guider.stats()
    assert stats["norm"].shape == stats["cosine"].shape == (6, 4)
    inside = 1 - stats["t"] >= 0.4 - 1e-6
    assert stats["norm"][inside].isfinite().all() and stats["norm"][~inside].isnan().all()  # none of a step before


@every_holder
def test_the_rule_checks_the_network(name):
    guider = ready(GUIDERS[name], (4, 4), rule={"name": "gfcg"}).using(classifier=lambda x: x[:, :3])
    denoiser = LAW.denoiser()
    with pytest.raises(ValueError, match="classifier with 3 classes for a model of 2"):
        sample(denoiser, flow(), noise(), labels(), guider=guider)
    assert denoiser.calls == 0


@every_holder
def test_a_rule_that_is_not_asked_refuses_nothing(name):
    guider = ready(GUIDERS[name], (4, 4), rule={"name": "cfg", "guidance_scale": 3.0}, enabled=False)
    sample(LAW.denoiser(), flow(), noise(), Condition({"class_labels": torch.zeros(4).long()}), guider=guider)


def moved(guider, index):
    """The answer at a second time for the samples ``index`` of four, which were resampled after the first."""
    state, x, answers = None, noise(), []
    for t in (0.9, 0.4):
        time = torch.tensor(t, dtype=F64)
        z, condition = (x, labels()) if state is None else (x[index], labels().index(index))
        guided, state = guider.guide(Point(LAW.denoiser(), z, time, time - 0.1, None, condition), state)
        state, answers = state.gather(index), [guided.prediction.raw]
    return answers[0]


@pytest.mark.parametrize("name", [None, *HOLDERS])
def test_rows_are_followed_from_before_the_window(name):
    """Samples that are resampled while nothing is done to them yet."""
    rule = {"start": 0.3, "guidance_scale": 2.0}
    given = {"classifier": classifier(), "candidates": Condition({"class_labels": torch.arange(2)})}
    given["desired"] = torch.tensor([0, 1, 1, 0])
    index = torch.tensor([3, 3, 1, 2])
    for settings in (dict(start=0.3), {}):
        if name is None:
            guider = GFCG(**rule)
        else:
            guider = ready(GUIDERS[name], (4, 4), rule={"name": "gfcg", **rule}, **settings)
        guider = guider.using(**given)
        torch.manual_seed(0)
        resampled = moved(guider, index)
        torch.manual_seed(0)
        torch.testing.assert_close(resampled, moved(guider, torch.arange(4))[index], rtol=1e-12, atol=1e-12)
