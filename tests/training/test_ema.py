"""Averages of weights, by every way there is to move them."""

import pytest
import torch

from genkit import kernels
from genkit.training.ema import EMA
from tests.needs import kernels_that_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)


def weights(dtype):
    """More than a block, less than one, one number, none, an order of memory that is not the axes', and a view."""
    made = {
        "long": torch.randn(97, 101),
        "short": torch.randn(7),
        "number": torch.randn(()),
        "empty": torch.randn(0, 4),
        "channels_last": torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last),
        "view": torch.randn(4, 6)[:, ::2],
    }
    view = torch.randn(4, 6).to(DEVICE, dtype)[:, ::2]  # a copy would be dense
    odd = torch.randn(9).to(DEVICE, dtype)[1:]  # begins where 16 bytes cannot be read at once
    return {name: x.to(DEVICE, dtype) for name, x in made.items()} | {"view": view, "odd": odd}


def exact(decay, history):
    """The definition in float64, one weight after the other."""
    averages = [x.double() for x in history[0]]
    for n, present in enumerate(history[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        averages = [d * a + (1 - d) * w.double() for a, w in zip(averages, present, strict=True)]
    return averages


@pytest.mark.parametrize("how", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_definition(dtype, how):
    if how == "on":
        kernels_that_run()
    parameters = weights(dtype)
    ema = EMA(parameters, [0.9, 0.5])
    history = [[x.clone() for x in parameters.values()]]
    with kernels.choose(how):
        for _ in range(4):
            for x in parameters.values():
                x.add_(torch.randn_like(x))
            ema.update()
            history.append([x.clone() for x in parameters.values()])
    for decay, averages in ema.averages.items():
        for average, wanted in zip(averages, exact(decay, history), strict=True):
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), wanted, rtol=2e-6, atol=2e-6)


def test_types_together():
    kernels_that_run()
    parameters = {f"{d}": torch.ones(40, dtype=d, device=DEVICE) for d in (*HALF, torch.float32, torch.float64)}
    ema = EMA(parameters, [0.9])
    for p in parameters.values():
        p.add_(1)
    with kernels.choose("on"):
        ema.update()
    for average in ema.averages[0.9]:
        torch.testing.assert_close(average, torch.full((40,), 2 - 2 / 11, device=DEVICE))


@pytest.mark.parametrize("dtype", HALF)
def test_the_kernel_takes_what_it_can(dtype, monkeypatch):
    """One launch for all of a type; what lies otherwise in memory than its average is not among them."""
    kernels_that_run()
    from genkit.training import _triton_ema

    taken = []
    of = _triton_ema.Group.__init__
    monkeypatch.setattr(_triton_ema.Group, "__init__", lambda self, a, w: (taken.append(len(w)), of(self, a, w))[1])
    parameters = weights(dtype)
    ema = EMA(parameters, [0.9])
    with kernels.choose("on"):
        ema.update()
        ema.update()
        assert taken == [5]  # not the view and not the odd one; kept for the second update
        parameters["long"].set_(torch.ones(97, 101, dtype=dtype, device=DEVICE))
        before = ema.averages[0.9][0].clone()
        ema.update()
    assert taken == [5, 5]
    step = 1 - 4 / 13
    torch.testing.assert_close(ema.averages[0.9][0], before + step * (1 - before))


def test_the_kernel_does_not_write_beyond():
    kernels_that_run()
    room = torch.full((3, 4096), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    weight = room[1, :40]
    weight.zero_()
    ema = EMA({"w": weight}, [0.9])
    wide = torch.full((3, 4096), torch.nan, device=DEVICE)
    wide[1, :40] = 1
    ema.averages[0.9][0] = wide[1, :40]
    with kernels.choose("on"):
        ema.update()
    assert wide.isnan().sum() == 3 * 4096 - 40
    torch.testing.assert_close(wide[1, :40], torch.full((40,), 2 / 11, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_averages_move(dtype):
    """An average in bfloat16 would stay where it is: 1 + 1e-4 is 1. After 20,000 steps 2 - 0.9999^20000 = 1.86468."""
    weight = torch.ones(8, dtype=dtype, device=DEVICE)
    ema = EMA({"w": weight}, [0.9999])
    ema.updates = 10**9  # long after the start
    weight.fill_(2)
    with kernels.choose("auto" if DEVICE == "cuda" else "off"):
        for _ in range(20_000):
            ema.update()
    torch.testing.assert_close(ema.averages[0.9999][0], torch.full((8,), 1.86468, device=DEVICE), rtol=0, atol=2e-4)


def test_swapped_and_kept():
    weight = torch.randn(5, dtype=torch.bfloat16, device=DEVICE)
    ema = EMA({"w": weight}, [0.9, 0.5])
    old = weight.clone()
    weight.add_(1)
    ema.update()
    present = weight.clone()
    with ema.swapped(0.5):
        torch.testing.assert_close(weight, ema.averages[0.5][0].bfloat16())
        assert not torch.equal(weight, present) and not torch.equal(weight, old)
    assert torch.equal(weight, present)
    other = EMA({"w": old}, [0.9, 0.5])
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.averages[d][0], ema.averages[d][0]) for d in (0.9, 0.5))
