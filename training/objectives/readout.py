"""Training of readout heads on a frozen denoiser."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from genkit.denoisers.base import Condition, Denoiser
from genkit.denoisers.flux import Flux
from genkit.denoisers.network import adapter_of, unwrap
from genkit.guidance.readout_targets import at_points, resized, unit
from genkit.networks.readout_head import SAMPLE, ReadoutHead, capture, readable
from genkit.registry import unknown
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role

EDGES = "edges"


class ReadoutConfig(ObjectiveConfig):
    """Settings of :class:`ReadoutObjective`.

    ``modules``: what the head reads, of what :func:`genkit.networks.readout_head.readable` lists or ``sample``; unset,
    all of that. ``target``: the data's field that a spatial head learns, or ``edges``, made from its pictures.
    ``sparse``: give background, where the target is least, and foreground equal weight. ``unconditional``: read the
    network without its condition, as in the paper.
    """

    kind: Literal["spatial", "appearance", "correspondence"] = "spatial"
    target: str = EDGES
    target_range: tuple[float, float] = (-0.5, 0.5)
    sparse: bool = False
    margin: float = Field(0.5, gt=0)
    temperature: float = Field(0.07, gt=0)
    modules: list[str] | None = Field(None, min_length=1)
    projection_dim: int = Field(384, ge=12)
    norm_num_groups: int = Field(32, ge=1)
    out_channels: int = Field(1, ge=1)
    time_conditioning: bool = True
    unconditional: bool = True
    t_min: float = Field(0.0, ge=0, lt=1)
    t_max: float = Field(1.0, gt=0, le=1)

    @field_validator("target_range")
    @classmethod
    def _increasing(cls, value):
        if not value[0] < value[1]:
            raise ValueError("must be (low, high) with low < high")
        return value


class ReadoutObjective(Objective):
    """A head learns to read a property off the features of the frozen student at any time.

    With ``x_t = alpha x0 + sigma eps``, ``t`` uniform on ``[t_min, t_max]``, ``F`` the head's features::

        spatial          mean (head(x_t) - target)^2       (sparse: mean over background + mean over foreground, halved)
        appearance       max(0, margin - d(x, negative) + d(x, positive)),   d = mean over pixels of 1 - cos(F, F')
        correspondence   cross-entropy of softmax(cos(F_p, F'_.) / temperature) at q, and of its mirror image, halved

    The data brings, beside ``x0``: a map ``(B, out_channels, H, W)`` named by ``target``; samples ``positive`` and
    ``negative``; or a sample ``pair`` and ``points``, int64 ``(B, K, 2, 2)``, pairs of ``(row, column)`` on the grid of
    ``x0`` in ``x0`` and ``pair``, negative where there are fewer than ``K``. Samples are of the student's space.

    ``explained`` in the logs is the share of a map's variance that the head accounts for.

    Source: Luo et al., "Readout guidance: learning control from diffusion features", arXiv 2312.02150.

    Raises:
        ValueError: modules that the student does not have, settings that the head refuses; at the first batch, a field
            that the data does not bring or that does not fit.
    """

    Config = ReadoutConfig

    def __init__(self, config: ReadoutConfig, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        network = self.student_module
        settings: dict[str, Any] = {} if config.time_conditioning else {"time_module": None}
        self.head = ReadoutHead.for_network(
            network,
            _modules(network, config.modules),
            kind="spatial" if config.kind == "spatial" else "feature",
            out_channels=config.out_channels,
            projection_dim=config.projection_dim,
            norm_num_groups=config.norm_num_groups,
            **settings,
        )

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"student": Role(self.student_module, trains=False), "head": Role(self.head, ema=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("head", trains=("head",)),)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        t = c.t_min + (c.t_max - c.t_min) * rng.uniform()
        if c.kind == "spatial":
            (readout,) = self._read([batch.x0], t, batch.condition, rng)
            target = self._map(batch).to(readout)
            loss = map_error(readout, resized(target, readout.shape[-2:]), c.target_range[0] if c.sparse else None)
            spread = (target - target.mean()).square().mean()
            mse = (readout.detach() - resized(target, readout.shape[-2:])).square().mean()
            yield Loss(loss.mean(), {"explained": 1 - mse / spread.clamp(min=1e-12)})
        elif c.kind == "appearance":
            pictures = [batch.x0, self._sample(batch, "positive"), self._sample(batch, "negative")]
            own, positive, negative = self._read(pictures, t, batch.condition, rng)
            gap = distance(own, negative) - distance(own, positive)
            yield Loss(F.relu(c.margin - gap).mean(), {"gap": gap.detach().mean()})
        else:
            own, other = self._read([batch.x0, self._sample(batch, "pair")], t, batch.condition, rng)
            points = self._points(batch)
            there, back = (
                point_error(*pair, points[:, :, order], c.temperature)
                for pair, order in (((own, other), [0, 1]), ((other, own), [1, 0]))
            )
            yield Loss(((there + back) / 2).mean(), {})

    def _read(self, pictures: Sequence[Tensor], t: Tensor, condition: Condition, rng: ItemRNG) -> tuple[Tensor, ...]:
        """Readouts of clean samples at one time, each under a noise of its own, in one call of the network."""
        n = len(pictures)
        if self.config.unconditional and condition.values:
            condition = condition.null()
        noise = [rng.normal(x.shape[1:], dtype=x.dtype) for x in pictures]
        z = self.student.interpolant.interpolate(torch.cat(list(pictures)), torch.cat(noise), t.repeat(n))
        with torch.no_grad():
            everyone = Condition.cat([condition] * n) if condition.values else condition
            _, seen = capture(self.student, [self.head], z, t.repeat(n), everyone)
        readout = self.head.read(seen, tuple(z.shape[-2:]))
        return readout.to(torch.promote_types(readout.dtype, torch.float32)).chunk(n)

    def _map(self, batch: Batch) -> Tensor:
        c = self.config
        if c.target == EDGES:
            target = edges(batch.fields["x0"]) * (c.target_range[1] - c.target_range[0]) + c.target_range[0]
        else:
            target = self._field(batch, c.target)
        if target.ndim != 4 or target.shape[1] != c.out_channels:
            raise ValueError(
                f"objective.target={c.target!r} has shape {tuple(target.shape)}; accepted is (B, {c.out_channels}, H, "
                "W), see objective.out_channels"
            )
        return target

    def _sample(self, batch: Batch, name: str) -> Tensor:
        value = self._field(batch, name)
        if value.shape != batch.x0.shape:
            raise ValueError(
                f"field {name!r} of the data has shape {tuple(value.shape)}; accepted is that of the network's "
                f"samples, {tuple(batch.x0.shape)}"
            )
        return value

    def _points(self, batch: Batch) -> Tensor:
        points, size = self._field(batch, "points"), torch.tensor(batch.x0.shape[-2:])
        fits = points.ndim == 4 and points.shape[2:] == (2, 2) and not points.is_floating_point()
        if not fits or (points >= size.to(points.device)).any():
            raise ValueError(
                f"field 'points' of the data has shape {tuple(points.shape)}; accepted are integers (B, K, 2, 2), "
                f"pairs of (row, column) below {tuple(size.tolist())}"
            )
        return points

    def _field(self, batch: Batch, name: str) -> Tensor:
        if name not in batch.fields:
            raise ValueError(unknown(f"objective.kind={self.config.kind!r}: field of the data", name, batch.fields))
        return batch.fields[name]


def edges(pictures: Tensor) -> Tensor:
    """``min(1, |grad|)`` of the mean over channels, by central differences: ``(B, C, H, W)`` to ``(B, 1, H, W)``."""
    grey = F.pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
    down = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
    return (across.square() + down.square()).sqrt().clamp(max=1)


def map_error(readout: Tensor, target: Tensor, background: float | None = None) -> Tensor:
    """Mean squared error of every sample ``(B,)``; with ``background`` the mean of that where the target has this value
    and that elsewhere, if there are both."""
    error = (readout - target).square()
    if background is None:
        return error.flatten(1).mean(1)
    behind = (target <= background + 1e-6).expand_as(error)
    counts = torch.stack([part.flatten(1).sum(1) for part in (behind, ~behind)])
    sums = torch.stack([(error * part).flatten(1).sum(1) for part in (behind, ~behind)])
    return (sums / counts.clamp(min=1)).sum(0) / (counts > 0).sum(0)


def distance(features: Tensor, other: Tensor) -> Tensor:
    """``mean(1 - cos)`` over pixels of features ``(B, P, h, w)``: ``(B,)``."""
    return (1 - (unit(features) * unit(other)).sum(1)).flatten(1).mean(1)


def point_error(own: Tensor, other: Tensor, points: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding ``q_k`` in ``other`` by the features at ``p_k`` in ``own``: ``(B,)``, means over points.

    Args:
        own, other: features ``(B, P, h, w)``.
        points: ``(B, K, 2, 2)``, pairs ``(p_k, q_k)`` of ``(row, column)``; negative ones are left out.
        temperature: by which cosines are divided.
    """
    there = (points >= 0).flatten(2).all(2)
    points = points.clamp(min=0)
    wanted = at_points(unit(own), points[:, :, 0])
    logits = torch.einsum("bpk,bpn->bkn", wanted, unit(other).flatten(2)) / temperature
    place = points[:, :, 1, 0] * other.shape[-1] + points[:, :, 1, 1]
    error = F.cross_entropy(logits.flatten(0, 1), place.flatten(), reduction="none").view(place.shape)
    return (error * there).sum(1) / there.sum(1).clamp(min=1)


def _modules(network, names: list[str] | None) -> list[tuple[str, int]]:
    known = dict(readable(network))
    if names is None:
        return list(known.items())
    config: Any = unwrap(network).config
    known[SAMPLE] = config.in_channels // (4 if adapter_of(network) is Flux else 1)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(unknown("objective.modules", wrong[0], known))
    return [(name, known[name]) for name in names]
