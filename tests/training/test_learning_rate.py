"""Learning rates that are held before they fall."""

import math

import pytest

from genkit.training.optimizers import lr_factor


@pytest.mark.parametrize("name", ["hold_linear", "hold_cosine"])
def test_learning_annealing(name):
    """FVQ's: from 0.005 over the warm-up, full for 30 % of the rest, down to 1 % at the last step."""
    factor = lr_factor(name, 100, 1101, 0.01)  # u = (t - 100) / 1000
    assert [factor(t) for t in (0, 50, 99)] == pytest.approx([0.005, 0.5025, 0.99005])
    assert factor(100) == factor(399) == 1
    assert factor(400) == pytest.approx(1) and factor(1100) == pytest.approx(0.01)
    fallen = (0.65 - 0.3) / 0.7
    left = 1 - fallen if name == "hold_linear" else (1 + math.cos(math.pi * fallen)) / 2
    assert factor(750) == pytest.approx(0.01 + 0.99 * left)
    assert factor(2000) == pytest.approx(0.01)


def test_held_for_another_share():
    factor = lr_factor("hold_linear", 0, 101, 0.01, 0.05)
    assert factor(0) == factor(4) == 1 and factor(5) == pytest.approx(1) and factor(6) < 1
    assert lr_factor("hold_linear", 0, 1, 0.0)(0) == 1


def test_settings(toys, tmp_path):
    from genkit.training.config import TrainConfig

    assert TrainConfig(**toys.settings(tmp_path, lr_scheduler="hold_cosine", lr_hold_ratio=0.05)).lr_hold_ratio == 0.05
    with pytest.raises(ValueError, match="lr_hold_ratio=0.05 needs lr_scheduler=hold_linear or hold_cosine"):
        TrainConfig(**toys.settings(tmp_path, lr_scheduler="cosine", lr_hold_ratio=0.05))
