"""Whether a reward is learned or exploited: its course beside that of rewards that are not trained on."""

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn

from genkit.denoisers.base import Denoiser
from genkit.training.adapters import adapter_names, base_network
from genkit.training.objectives.base import DivergedError

_CERTAIN = 3.0  # standard errors


class Trends(nn.Module):
    """The last ``window`` steps' means of a trained reward and of held-out ones, the same on every process.

    Args:
        held_out: names of the latter.
        window: steps that are remembered.
    """

    history: Tensor
    steps: Tensor

    def __init__(self, held_out: Sequence[str], window: int):
        super().__init__()
        self.held_out = tuple(held_out)
        self.register_buffer("history", torch.full((window, 1 + len(held_out)), torch.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._noted: list[Tensor] = []

    def note(self, values: Tensor) -> None:
        """Rewards of samples of the step under way, ``(B, 1 + held-out)``; NaN is left out."""
        self._noted.append(values.detach().double())

    def update(self) -> str | None:
        """End of a step: take what was noted on all processes into account; a warning, where there is one.

        Raises:
            DivergedError: no sample had a finite reward.
        """
        values = torch.cat(self._noted)
        self._noted.clear()
        there = values.isfinite()
        sums = torch.stack((values.where(there, 0.0).sum(0), there.double().sum(0)))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        means = sums[0] / sums[1]
        if not bool(means[0].isfinite()):
            raise DivergedError("the reward was not finite for any sample of a step")
        window = len(self.history)
        self.history[int(self.steps) % window] = means
        self.steps += 1
        full, due = int(self.steps) >= window, int(self.steps) % (window // 2) == 0
        return self._compare() if full and due and self.held_out else None

    def recent(self, n: int) -> float | None:
        """The trained reward's mean over the last ``n`` steps; ``None`` before there were as many."""
        steps, window = int(self.steps), len(self.history)
        if steps < min(n, window):
            return None
        rows = [(steps - 1 - k) % window for k in range(min(n, window))]
        return self.history[rows, 0].mean().item()

    def _compare(self) -> str | None:
        ordered = self.history.roll(-int(self.steps), 0)
        first, last = ordered.chunk(2)
        error = (first.var(0) / len(first) + last.var(0) / len(last)).sqrt()
        change, certain = last.mean(0) - first.mean(0), _CERTAIN * error
        if not bool(change[0] > certain[0]):
            return None
        falling = [
            f"{name} {first[:, k].mean():.4g} -> {last[:, k].mean():.4g}"
            for k, name in enumerate(self.held_out, 1)
            if bool(change[k] < -certain[k])
        ]
        if not falling:
            return None
        return (
            f"the trained reward rises ({first[:, 0].mean():.4g} -> {last[:, 0].mean():.4g} over the last "
            f"{len(ordered)} steps) while held-out ones fall ({', '.join(falling)}): it is being exploited; stop here, "
            "lower the learning rate, or mix in what falls"
        )


def distance_from_start(student: Denoiser) -> Callable[[], Tensor]:
    """A function that gives ``|theta - theta_0|`` over all weights that train, ``theta_0`` being those of now.

    Of a LoRA, the norm of the change that it makes, ``|s B A|`` over all layers, without forming it; of other weights
    from a copy.
    """
    if "default" in adapter_names(student):
        layers = [m for m in base_network(student).modules() if isinstance(m, BaseTunerLayer)]
        return lambda: _lora_norm(layers)
    pairs = [(w, w.detach().clone()) for w in student.module.parameters() if w.requires_grad]

    @torch.no_grad()
    def distance() -> Tensor:
        return torch.stack([(w - start.to(w)).double().square().sum() for w, start in pairs]).sum().sqrt()

    return distance


@torch.no_grad()
def _lora_norm(layers: Sequence[BaseTunerLayer]) -> Tensor:
    squares = []
    for layer in layers:
        if "default" in layer.lora_A:
            a, b = (part["default"].weight.double().flatten(1) for part in (layer.lora_A, layer.lora_B))
            # |B A|^2 = tr (B'B)(A A')
            squares.append(layer.scaling["default"] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
    return torch.stack(squares).sum().sqrt()
