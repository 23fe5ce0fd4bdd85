"""The weighted sum: its value, its statistics, and what it refuses."""

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from genkit.rewards.base import Reward
from genkit.rewards.weighted_sum import RewardSum


class Brightness(Reward):
    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class Length(Reward):
    takes = "prompts"
    differentiable = False

    def score(self, images, prompts):
        return torch.tensor([float(len(text)) for text in prompts])


class Label(Reward):
    takes = "labels"

    def score(self, images, prompts):
        return prompts.float()


PAIR = {"bright": Brightness(), "long": Length()}
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def running(decay=1.0, **components):
    components = components or {"bright": Brightness()}
    return RewardSum(components, dict.fromkeys(components, 1.0), "running", decay)


def noted(total, values):
    total.note({"bright": torch.as_tensor(values)})
    total.update()
    return total


def test_a_sum_of_raw_values():
    total, raw = RewardSum(PAIR, {"bright": 2.0, "long": -0.5})(IMAGES, TEXTS)
    bright = IMAGES.mean((1, 2, 3))
    assert list(raw) == ["bright", "long"] and torch.equal(raw["bright"], bright)
    torch.testing.assert_close(total, 2 * bright - 0.5 * torch.arange(1.0, 6))


def test_constants_shift_and_scale_each_component_and_leave_the_raw_values():
    total, raw = RewardSum(PAIR, {"long": 1.0, "bright": 2.0}, {"bright": (0.5, 0.1), "long": (3, 2)})(IMAGES, TEXTS)
    torch.testing.assert_close(total, 2 * (raw["bright"] - 0.5) / 0.1 + (torch.arange(1.0, 6) - 3) / 2)
    assert total.dtype == torch.float32


def test_the_gradient_is_the_weighted_one():
    images = IMAGES.clone().requires_grad_()
    RewardSum({"bright": Brightness()}, {"bright": 3.0}, {"bright": (9.0, 0.5)})(images)[0].sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 3 / 0.5 / 48))


def test_running_statistics_without_forgetting_are_those_of_all_values():
    values = 1e4 + numpy.random.default_rng(0).normal(size=60)  # the mean is large: squares of it would cost digits
    total = running()
    for part in numpy.split(values, [1, 8, 30]):
        noted(total, part)
    mean, std = total.statistics()["bright"]
    assert abs(mean.item() - values.mean()) < 1e-9 and abs(std.item() - values.std()) < 1e-9


def test_older_values_count_less_by_the_decay():
    values = numpy.random.default_rng(0).normal(size=(6, 4))
    total = running(decay=0.5)
    for part in values:
        noted(total, part)
    weights = numpy.repeat(0.5 ** numpy.arange(5, -1, -1), 4)
    mean = numpy.average(values.ravel(), weights=weights)
    std = numpy.sqrt(numpy.average((values.ravel() - mean) ** 2, weights=weights))
    torch.testing.assert_close(torch.stack(total.statistics()["bright"]), torch.tensor([mean, std]))


def test_a_step_in_parts_is_the_step_as_a_whole():
    values, parts, whole = torch.randn(8), running(0.9), running(0.9)
    for total in (parts, whole):
        noted(total, [1.0, 2.0])
    for part in values.split(3):
        parts.note({"bright": part})
    parts.update()
    noted(whole, values)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-12, atol=0)


def test_scoring_and_noting_do_not_change_what_is_scored():
    total = noted(running(), [0.0, 1.0])
    before = total(IMAGES)[0]
    total.note({"bright": torch.randn(5)})
    assert torch.equal(total(IMAGES)[0], before)
    assert torch.equal(torch.cat([total(part)[0] for part in IMAGES.split(2)]), before)
    total.update()
    assert not torch.equal(total(IMAGES)[0], before)


def test_a_component_is_raw_until_two_values_are_known():
    total = running()
    raw = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(noted(total, [float("nan"), 7.0])(IMAGES)[0], raw)
    torch.testing.assert_close(noted(total, [9.0, float("inf")])(IMAGES)[0], raw - 8)  # std 1 about the mean of 8


def test_a_constant_component_is_not_amplified_without_bound():
    total = noted(running(), [0.5, 0.5, 0.5])
    torch.testing.assert_close(total(IMAGES)[0], (IMAGES.mean((1, 2, 3)) - 0.5) / 1e-4)


def test_statistics_survive_the_state_dict():
    total = noted(running(), [1.0, 2.0, 4.0])
    other = running()
    assert set(total.state_dict()) == {"count", "mean", "variance"}
    other.load_state_dict(total.state_dict())
    assert torch.equal(other(IMAGES)[0], total(IMAGES)[0])


def test_fixed_normalisation_has_no_statistics():
    total = RewardSum({"bright": Brightness()}, {"bright": 1.0})
    noted(total, [1.0, 2.0])
    assert not total.state_dict() and torch.equal(total(IMAGES)[0], IMAGES.mean((1, 2, 3)))


def _one_of_two(rank, file, values, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    total = running(0.9)
    for step in values:
        total.note({"bright": step[:5] if rank == 0 else step[5:]})
        total.update()
    results[rank] = [tensor.tolist() for tensor in total.state_dict().values()]
    dist.destroy_process_group()


def test_two_processes_share_their_statistics(tmp_path):
    values = torch.randn(2, 7)
    whole = running(0.9)
    for step in values:
        noted(whole, step)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_one_of_two, (tmp_path / "sync", values, results), nprocs=2, start_method="fork")
        results = dict(results)
    assert results[0] == results[1]
    expected = torch.stack(list(whole.state_dict().values()))
    torch.testing.assert_close(torch.tensor(results[0], dtype=torch.float64), expected, rtol=1e-12, atol=0)


def test_what_the_sum_says_of_its_components():
    both = RewardSum(PAIR, {"bright": 1.0, "long": 1.0})
    assert both.takes == "prompts" and not both.differentiable
    alone = RewardSum({"bright": Brightness()}, {"bright": 1.0})
    assert alone.takes is None and alone.differentiable


def test_every_component_is_asked_about_the_size():
    class Picky(Brightness):
        def check_size(self, shape):
            raise ValueError(f"size {shape}")

    with pytest.raises(ValueError, match=r"size \(3, 8, 8\)"):
        RewardSum({"bright": Brightness(), "picky": Picky()}, {"bright": 1.0, "picky": 1.0}).check_size((3, 8, 8))


ONE = {"bright": Brightness()}


@pytest.mark.parametrize(
    ("components", "weights", "normalise", "decay", "message"),
    [
        ({}, {}, "none", None, "at least one"),
        ({"a.b": Brightness()}, {"a.b": 1.0}, "none", None, "without dots"),
        ({"keys": Brightness()}, {"keys": 1.0}, "none", None, "methods"),
        (ONE, {"dark": 1.0}, "none", None, r"weights of \['dark'\].*\['bright'\]"),
        (ONE, {"bright": float("nan")}, "none", None, "finite"),
        (ONE, {"bright": 1.0}, "zscore", None, "normalise='zscore'"),
        (ONE, {"bright": 1.0}, {}, None, "normalise of"),
        (ONE, {"bright": 1.0}, {"bright": (0, 0)}, None, "std above 0"),
        (ONE, {"bright": 1.0}, {"bright": (float("inf"), 1)}, None, "finite mean"),
        (ONE, {"bright": 1.0}, "none", 0.9, "no effect"),
        (ONE, {"bright": 1.0}, "running", 0.0, r"\(0, 1\]"),
        ({"long": Length(), "label": Label()}, {"long": 1.0, "label": 1.0}, "none", None, "take"),
    ],
)
def test_bad_settings_are_refused(components, weights, normalise, decay, message):
    with pytest.raises(ValueError, match=message):
        RewardSum(components, weights, normalise, decay)


def test_values_of_other_labels_are_refused():
    total = running()
    for method in (total.note, total.combine):
        with pytest.raises(ValueError, match="values of"):
            method({"dark": torch.zeros(2)})
