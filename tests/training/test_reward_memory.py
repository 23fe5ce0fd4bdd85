"""What strategies of reward fine-tuning keep for the backward, in network calls and in states."""

import importlib.util
import sys
from pathlib import Path

import pytest

from genkit.training.objectives.draft import DRaFT
from genkit.training.objectives.draft_lv import DRaFTLV
from genkit.training.objectives.leapalign import LeapAlign

FOLDER = Path(__file__).parents[2] / "benchmarks"
CALL, STATE = 402, 16  # KiB: of a network call, and of a batch's samples


@pytest.fixture(scope="module")
def saved():
    """``saved(cls, steps, **settings)``, in KiB; the benchmark's own counting."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("reward_memory", FOLDER / "reward_memory.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))

    def measure(cls, steps, **settings):
        net = module.Net(3)
        run = module.step(cls, steps, settings, net, 8, "cpu") if cls else module.one_call(net, 8, "cpu")
        with module.saved(tuple(net.parameters())) as alive:
            run()
        assert alive.bytes == 0  # all of it is given back
        return alive.most / 1024

    return measure


def test_a_network_call(saved):
    assert saved(None, 1) == CALL


@pytest.mark.parametrize("leaps", [1, 2, 3])
def test_sequential_leaps_hold_one_call(saved, leaps):
    short, long = (saved(LeapAlign, n, leaps=leaps) for n in (4, 20))
    assert short == long <= 1.1 * CALL


def test_joint_leaps_hold_a_call_each(saved):
    assert saved(LeapAlign, 4, form="joint", recompute=False) == pytest.approx(2 * CALL + STATE, abs=2)


def test_draft_k_is_linear_in_k(saved):
    for k in (1, 2, 5):
        assert saved(DRaFT, 6, live_steps=k, recompute=False) == pytest.approx(k * CALL + STATE, abs=2)
    assert saved(DRaFT, 20, live_steps=2, recompute=False) == saved(DRaFT, 6, live_steps=2, recompute=False)


def test_computing_again_leaves_a_state_a_step(saved):
    for k in (2, 6):
        assert saved(DRaFT, 6, live_steps=k, recompute=True) == pytest.approx((k + 1) * STATE, abs=2)


def test_copies_are_one_call_at_a_time(saved):
    assert saved(DRaFTLV, 4, copies=4) <= 1.1 * CALL
