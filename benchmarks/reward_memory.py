"""How much memory strategies of reward fine-tuning hold, by the number of steps that they sample in.

Batches of 64 samples, a perceptron on every 64 numbers of them, float32, and a reward that needs next to nothing; ``one
call`` is a network call with its backward. ``saved`` is what autograd keeps for the backward at the most, storages
counted once, parameters not; three hidden layers. ``peak`` is all that is computed and alive at the most, also while
calls are computed again; sixteen layers and larger samples, beside whose activations a state is small, as in networks
in use. Where there is a GPU, ``peak, GPU`` is what that allocated beyond weights and their gradients.

Sequential LeapAlign holds as much at 50 steps as at 10, and at most 1.1 of a call. DRaFT-K holds ``K`` calls, whatever
the number of steps; with ``recompute`` one call and ``K`` states, to a tenth. Copies of DRaFT-LV hold one call.
"""

import gc
import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from _common import report
from _memory import Alive, Peak
from torch import Tensor, nn

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.schedulers import ExactDenoiserScheduler
from genkit.training.objectives.base import Batch
from genkit.training.objectives.draft import DRaFT
from genkit.training.objectives.draft_lv import DRaFTLV
from genkit.training.objectives.leapalign import LeapAlign

WIDTH, BATCH, KIB = 64, 64, 1024
# Layers, and the side of the pictures.
COLUMNS = {"saved": (3, 8), "peak": (16, 32)}
if torch.cuda.is_available():
    COLUMNS["peak, GPU"] = (16, 128)

STRATEGIES: dict[str, tuple] = {
    "DRaFT-1": (DRaFT, 10, dict(live_steps=1, recompute=False)),
    "DRaFT-2": (DRaFT, 10, dict(live_steps=2, recompute=False)),
    "DRaFT-5": (DRaFT, 10, dict(live_steps=5, recompute=False)),
    "DRaFT-5 of 50": (DRaFT, 50, dict(live_steps=5, recompute=False)),
    "DRaFT": (DRaFT, 10, dict(live_steps=None, recompute=False)),
    "DRaFT-5, recompute": (DRaFT, 10, dict(live_steps=5, recompute=True)),
    "DRaFT, recompute": (DRaFT, 10, dict(live_steps=None, recompute=True)),
    "DRaFT of 50, recompute": (DRaFT, 50, dict(live_steps=None, recompute=True)),
    "DRaFT-LV 2": (DRaFTLV, 10, dict(copies=2)),
    "LeapAlign, sequential": (LeapAlign, 10, {}),
    "LeapAlign of 50, sequential": (LeapAlign, 50, {}),
    "LeapAlign of 50, 3 leaps": (LeapAlign, 50, dict(leaps=3)),
    "LeapAlign, joint": (LeapAlign, 10, dict(form="joint", recompute=False)),
    "LeapAlign of 50, joint": (LeapAlign, 50, dict(form="joint", recompute=False)),
}


class Net(nn.Module):
    """``depth`` x 256 SiLU on 64 numbers and 8 features of the time, for every 64 pixels."""

    def __init__(self, depth: int):
        super().__init__()
        widths = (WIDTH + 8, *[256] * depth)
        hidden = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(256, WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(x)[:, None] * torch.arange(1, 5, device=x.device)
        rows = x.reshape(-1, WIDTH)
        times = torch.cat((angles.sin(), angles.cos()), 1).repeat_interleave(len(rows) // len(x), 0)
        return self.body(torch.cat((rows, times), 1)).view(x.shape)


def brightness(images: Tensor) -> Tensor:
    """Mean of the pixels."""
    return images.flatten(1).mean(1)


@contextmanager
def saved(without: tuple[Tensor, ...]):
    """Within, what autograd saves is counted in the :class:`Alive` that it gives."""
    alive = Alive(without)

    class Held:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        alive.add(tensor, held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield alive


def step(cls, steps: int, settings: dict, net: Net, side: int, device: str) -> Callable[[], None]:
    """One training step."""
    reward = dict(name="function", path=f"{__file__}:brightness", differentiable=True)
    pipe = types.SimpleNamespace(components={}, scheduler=ExactDenoiserScheduler())
    config = cls.Config(rewards=[reward], num_inference_steps=steps, **settings)
    objective = cls.make(config, FunctionDenoiser(net, Linear(), "flow_prediction"), None, pipe).to(device)
    index = torch.arange(BATCH, device=device)
    batch = Batch(torch.zeros(BATCH, 1, side, side, device=device), Condition(), index)

    def run() -> None:
        for loss in objective.losses(objective.phases(0)[0], batch, ItemRNG(0, index)):
            loss.value.backward()

    return run


def one_call(net: Net, side: int, device: str) -> Callable[[], None]:
    """A network call and its backward."""
    x, t = torch.zeros(BATCH, 1, side, side, device=device), torch.ones(BATCH, device=device)
    return lambda: net(x, t).sum().backward()


def measured(make: Callable[[Net, int, str], Callable[[], None]]) -> dict[str, float]:
    """What each of ``COLUMNS`` says of a training step, KiB."""
    row = {}
    for column, (depth, side) in COLUMNS.items():
        device = "cuda" if "GPU" in column else "cpu"
        net = Net(depth).to(device)
        run = make(net, side, device)
        run()  # gradients are there, and what is made once
        gc.collect()
        known = tuple(t for w in net.parameters() for t in (w, w.grad) if t is not None)
        if column == "saved":
            with saved(known) as alive:
                run()
            most = alive.most
        elif column == "peak":
            with Peak(known) as mode:
                run()
            most = mode.alive.most
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated() - before
        row[column] = most / KIB
    return row


def main() -> None:
    torch.manual_seed(0)
    rows = {"one call": measured(one_call)}
    for name, (cls, steps, settings) in STRATEGIES.items():
        rows[name] = measured(lambda *args, c=cls, s=steps, given=settings: step(c, s, given, *args))
    bounds = {}
    for column, (_, side) in COLUMNS.items():
        held = {name: row[column] for name, row in rows.items()}
        call, state = held["one call"], BATCH * side**2 * 4 / KIB
        again = held["DRaFT of 50, recompute"] / (call + 50 * state)
        bounds |= {
            f"{column}: LeapAlign / one call": (held["LeapAlign of 50, sequential"] / call, 1.1),
            f"{column}: LeapAlign, 50 steps / 10": (ratio(held, "LeapAlign{}, sequential"), 1.001),
            f"{column}: DRaFT-LV / one call": (held["DRaFT-LV 2"] / call, 1.1),
            f"{column}: DRaFT-5, 50 steps / 10": (ratio(held, "DRaFT-5{}"), 1.001),
            f"{column}: DRaFT-K, calls off a line": (bent(held) / call, 0.05),
            f"{column}: DRaFT of 50, recompute / (one call + 50 states)": (again, 1.1),
        }
    report("reward_memory", [{"strategy": name} | row for name, row in rows.items()], bounds)


def ratio(held: dict[str, float], strategy: str) -> float:
    """Memory at 50 steps over that at 10."""
    return held[strategy.format(" of 50")] / held[strategy.format("")]


def bent(held: dict[str, float]) -> float:
    """How far DRaFT-5 is from the line through DRaFT-1 and DRaFT-2, and DRaFT-10 from that too."""
    slope = held["DRaFT-2"] - held["DRaFT-1"]
    return max(abs(held[name] - held["DRaFT-1"] - (k - 1) * slope) for name, k in (("DRaFT-5", 5), ("DRaFT", 10)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
