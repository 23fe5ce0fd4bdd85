"""Several rewards as one: each brought to a common scale, weighted and added."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genkit.rewards.base import Prompts, Reward

Normalise = Literal["none", "running"] | Mapping[str, tuple[float, float]]
"""Raw values; the mean and std of what :meth:`RewardSum.note` was told; or constants ``{label: (mean, std)}``."""

_LEAST_STD = 1e-4  # a component that has become constant must not be amplified without bound


class RewardSum(nn.Module):
    """``sum_m w_m (r_m - mean_m) / std_m`` over components ``r_m``.

    Scoring never changes the statistics, so that a batch gives the same values however it is cut. ``running`` ones
    change in :meth:`update`, once a training step, by what :meth:`note` was told since the last. They are discounted by
    ``decay`` an update, since rewards drift in training: mean and (population) variance are exactly those of all values
    so far, one of ``k`` updates ago counted ``decay^k`` times. Until two values of a component count, it is taken as it
    is. The statistics are buffers in the state dict.

    Args:
        components: rewards by label.
        weights: by the same labels; negative ones punish.
        normalise: see :data:`Normalise`; constants have every label.
        decay: in (0, 1], 0.99 if not given; 1 forgets nothing. Of ``running`` only.

    Attributes:
        components: as given.
        takes: what the components read, ``None`` where all look at the images alone.
        differentiable: whether all components are.

    Raises:
        ValueError: no components, labels that differ or that modules cannot have, a weight that is not finite, a std
            that is not positive, ``decay`` out of range or without ``running``, components of which some read texts and
            others labels.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    noted: Tensor

    def __init__(
        self,
        components: Mapping[str, Reward],
        weights: Mapping[str, float],
        normalise: Normalise = "none",
        decay: float | None = None,
    ):
        super().__init__()
        if not components:
            raise ValueError("rewards={}: accepted is at least one")
        if bad := [label for label in components if not label or "." in label or hasattr(nn.ModuleDict, label)]:
            raise ValueError(f"reward labels {bad}: accepted are names without dots, but not those of a dict's methods")
        _same_labels("weights", weights, components)
        if nan := {label: w for label, w in weights.items() if not math.isfinite(w)}:
            raise ValueError(f"weights={nan}: accepted are finite numbers")
        self.components = nn.ModuleDict(components)
        self.weights = {label: float(weights[label]) for label in components}
        self.takes = _common_takes(components)
        self.differentiable = all(reward.differentiable for reward in components.values())
        self._constants = {label: (0.0, 1.0) for label in components}
        if isinstance(normalise, Mapping):
            _same_labels("normalise", normalise, components)
            for label, (mean, std) in normalise.items():
                if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                    raise ValueError(f"normalise[{label}]={(mean, std)}: accepted is a finite mean and a std above 0")
                self._constants[label] = (float(mean), float(std))
        elif normalise not in ("none", "running"):
            raise ValueError(f"normalise={normalise!r}: accepted are none, running, and {{label: [mean, std]}}")
        self.running = normalise == "running"
        if decay is not None and not self.running:
            raise ValueError(f"decay={decay} has no effect with normalise={normalise}; accepted with running")
        self.decay = 0.99 if decay is None else decay
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={decay}: accepted is (0, 1]")
        if self.running:
            for name in ("count", "mean", "variance"):
                self.register_buffer(name, torch.zeros(len(components), dtype=torch.float64))
            self.register_buffer("noted", torch.zeros(3, len(components), dtype=torch.float64), persistent=False)

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum ``(B,)`` and every component as it is, ``{label: (B,)}``, as :class:`Reward` takes and gives them."""
        raw = {label: reward(images, prompts) for label, reward in self.components.items()}
        return self.combine(raw), raw

    def combine(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The sum ``(B,)`` of components that are known, ``{label: (B,)}``."""
        _same_labels("values", raw, self.components)
        statistics = self.statistics()
        terms = [w * (raw[label] - statistics[label][0]) / statistics[label][1] for label, w in self.weights.items()]
        return torch.stack(terms).sum(0)

    def statistics(self) -> dict[str, tuple[float | Tensor, float | Tensor]]:
        """``{label: (mean, std)}`` that the components are normalised by."""
        if not self.running:
            return dict(self._constants)
        known = self.count >= 2
        mean = torch.where(known, self.mean, torch.zeros_like(self.mean))
        std = torch.where(known, self.variance.sqrt().clamp(min=_LEAST_STD), torch.ones_like(self.mean))
        return dict(zip(self.components, zip(mean, std, strict=True), strict=True))

    @torch.no_grad()
    def note(self, raw: Mapping[str, Tensor]) -> None:
        """Keep values ``{label: (N,)}`` of this step for :meth:`update`, those that are not finite left out."""
        _same_labels("values", raw, self.components)
        if not self.running:
            return
        for i, label in enumerate(self.components):
            values = raw[label].detach().flatten().to(self.mean)
            # About the mean so far, which all processes share: such moments add up, and a large mean costs no digits.
            values = values[values.isfinite()] - self.mean[i]
            self.noted[:, i] += torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()])

    @torch.no_grad()
    def update(self) -> None:
        """Take what was noted into the statistics; all processes call it, whether or not they have noted anything."""
        if not self.running:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.noted)
        new, first, second = self.noted
        old = self.decay * self.count
        count = old + new
        seen = count.clamp(min=torch.finfo(count.dtype).tiny)  # without any values all three stay zero
        shift = first / seen
        self.variance.copy_(((old * self.variance + second) / seen - shift.square()).clamp(min=0))
        self.mean.add_(shift)
        self.count.copy_(count)
        self.noted.zero_()

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Ask every component whether it can take images of ``shape`` ``(C, H, W)``."""
        for reward in self.components.values():
            reward.check_size(shape)  # type: ignore[operator]  # a ModuleDict forgets what its modules are


def _common_takes(components: Mapping[str, Reward]) -> Literal["prompts", "labels"] | None:
    takes = {label: reward.takes for label, reward in components.items() if reward.takes}
    if len(set(takes.values())) > 1:
        raise ValueError(f"rewards take {takes}; accepted are texts for all or class labels for all")
    return next(iter(takes.values()), None)


def _same_labels(setting: str, given: Iterable[str], labels: Iterable[str]) -> None:
    if set(given) != set(labels):
        raise ValueError(f"{setting} of {sorted(given)}; accepted is one for each of {sorted(labels)}")
