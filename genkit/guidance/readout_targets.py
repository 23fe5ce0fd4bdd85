"""What a readout is pulled towards: the losses of readout guidance, per sample."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from genkit.guidance.rows import check_rows, rows_like, rows_of
from genkit.networks.readout_head import ReadoutHead
from genkit.rng import hash_seed

Box = tuple[int, int, int, int]


def spatial_loss(readout: Tensor, control: Tensor, scale: Tensor) -> Tensor:
    """``mean((A(readout) - A(control))^2)`` for the affine map ``A`` of slope ``scale`` ``(B,)``: ``(B,)``."""
    return scale.square() * (readout - control).square().flatten(1).mean(1)


def appearance_loss(own: Tensor, reference: Tensor, span: Tensor) -> Tensor:
    """``span^2 mean(1 - cos(own, reference))`` over pixels of features ``(B, P, h, w)``; ``span``, result ``(B,)``."""
    cosine = (unit(own) * unit(reference)).sum(1)
    return span.square() * (1 - cosine).flatten(1).mean(1)


def correspondence_loss(own: Tensor, reference: Tensor, points: Tensor) -> Tensor:
    """``(mean_k S[p_k, p_k] - mean_k S[p_k, q_k]) / 2`` with ``S[p, q] = (cos(reference_p, own_q) + 1) / 2``: ``(B,)``.

    0 if nothing has moved, -1/4 if what was at ``p_k`` is at ``q_k`` and unlike what is at ``p_k`` now.

    Args:
        own, reference: features ``(B, P, h, w)``.
        points: ``(B, K, 2, 2)``, pairs ``(p_k, q_k)`` of ``(row, column)``.
    """
    start, end = points[:, :, 0], points[:, :, 1]
    wanted = unit(at_points(reference, start))
    moved, stayed = (((wanted * unit(at_points(own, p))).sum(1) + 1) / 2 for p in (end, start))
    return 0.5 * (stayed.mean(1) - moved.mean(1))


def unit(features: Tensor) -> Tensor:
    """Features over axis 1 divided by their norm; zero, with no gradient, where they vanish."""
    square = features.square().sum(1, keepdim=True)
    there = square > 1e-24 if features.dtype == torch.float64 else square > 1e-12
    return torch.where(there, features, 0) * square.where(there, 1).rsqrt()


def at_points(features: Tensor, points: Tensor) -> Tensor:
    """Features ``(B, P, h, w)`` at ``(row, column)`` ``points`` ``(B, K, 2)``: ``(B, P, K)``."""
    index = points[..., 0] * features.shape[-1] + points[..., 1]
    return features.flatten(2).gather(2, index[:, None].expand(-1, features.shape[1], -1))


def resized(control: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``(B, C, H, W)`` on a grid of ``size``: averages over the pixels that fall into one."""
    return F.interpolate(control, size=size, mode="area")


@dataclass(frozen=True, kw_only=True, eq=False)
class Target(ABC):
    """A head, what its readout is compared with, and the weight of the comparison among several.

    Tensors have one row for all samples, or one a sample.
    """

    head: ReadoutHead
    weight: float = 1.0
    kind = ""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse what does not fit samples of ``shape``; ``name`` is the target's own.

        Raises:
            ValueError: a head of another kind, a weight that is no number, rows that are neither one nor one a sample,
                something of another shape than the samples.
        """
        if self.head.config.kind != self.kind:
            raise ValueError(
                f"targets[{name!r}] is a {type(self).__name__}, which takes a head of kind {self.kind!r}, got "
                f"{self.head.config.kind!r}"
            )
        if not math.isfinite(self.weight):
            raise ValueError(f"targets[{name!r}].weight={self.weight!r}: accepted are finite numbers")
        if len(shape) not in (2, 3, 4):
            raise ValueError(f"samples of shape {shape}: readout guidance takes images (B, C, H, W) or tokens of them")
        self._check(name, shape)

    @abstractmethod
    def _check(self, name: str, shape: tuple[int, ...]) -> None: ...

    @abstractmethod
    def picture(self) -> Tensor:
        """What has the proportions of the samples, ``(1 or B, C, H, W)``."""

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The grid ``(h, w)`` of latents of ``shape``; that of packed tokens follows from the target's proportions."""
        if len(shape) == 4:
            return shape[2], shape[3]
        if len(shape) == 2:
            return 1, 1
        height, width = self.picture().shape[-2:]
        rows = round(math.sqrt(shape[1] * height / width))
        return 2 * rows, 2 * (shape[1] // max(rows, 1))

    @abstractmethod
    def loss(self, readout: Tensor, reference: Tensor | None, index: Tensor, span: Tensor) -> Tensor:
        """``(B,)``, from the readout of the samples and of the reference; ``span`` is max - min of each sample and
        ``index`` the row of each in the targets."""

    def _rows(self, name: str, field: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if len(value) not in (1, shape[0]):
            raise ValueError(
                f"targets[{name!r}].{field} has {len(value)} rows; accepted is 1, or one for each of {shape[0]} samples"
            )

    def _check_proportions(self, name: str, field: str, value: Tensor, shape: tuple[int, ...]) -> None:
        rows, columns = self.size(shape)
        height, width = value.shape[-2:]
        wrong = len(shape) == 3 and (rows // 2) * (columns // 2) != shape[1]
        if wrong or abs(height * columns - width * rows) > max(height, width):  # a pixel of rounding
            raise ValueError(
                f"targets[{name!r}].{field} is {height} x {width}, which has not the proportions of samples of shape "
                f"{shape}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class SpatialTarget(Target):
    """Pull a spatial readout towards a map: pose, depth, edges.

    Args:
        head, weight: see :class:`Target`.
        control: ``(1 or B, out_channels, H, W)``, any size of the samples' proportions, values in ``control_range``.
        control_range: of the maps that the head was trained on; mapped to the range of each sample's own latents.
    """

    control: Tensor
    control_range: tuple[float, float] = (-0.5, 0.5)
    kind = "spatial"

    def _check(self, name, shape):
        channels, (low, high) = self.head.config.out_channels, self.control_range
        if self.control.ndim != 4 or self.control.shape[1] != channels:
            raise ValueError(
                f"targets[{name!r}].control has shape {tuple(self.control.shape)}; accepted is (1 or B, {channels}, "
                "H, W), as many channels as the head gives"
            )
        if not low < high:
            raise ValueError(f"targets[{name!r}].control_range={self.control_range!r}: accepted is low < high")
        slack = 1e-3 * (high - low)
        # written so that NaN fails
        if not (self.control.min() >= low - slack and self.control.max() <= high + slack):
            raise ValueError(
                f"targets[{name!r}].control has values from {self.control.min():g} to {self.control.max():g}; accepted "
                f"is control_range={self.control_range!r}"
            )
        self._rows(name, "control", self.control, shape)
        self._check_proportions(name, "control", self.control, shape)

    def picture(self):
        return self.control

    def loss(self, readout, reference, index, span):
        control = rows_of(self.control, index).to(readout)
        low, high = self.control_range
        return spatial_loss(readout, resized(control, readout.shape[-2:]), span / (high - low))


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceTarget(Target):
    """A target that compares features with those of a reference.

    Args:
        reference: clean samples ``(1 or B, C, H, W)`` in the denoiser's space. The head reads their features at the
            same time as the sample's, from ``alpha reference + sigma noise``.
        noise: of the reference's shape; by default the same draw in every run.
    """

    reference: Tensor
    noise: Tensor | None = None
    kind = "feature"

    def picture(self):
        return self.reference

    def noisy(self, interpolant, t: Tensor, like: Tensor, index: Tensor) -> Tensor:
        """The references of the samples at ``index`` at time ``t``, of the shape of ``like``."""
        noise = self.noise
        if noise is None:
            generator = torch.Generator().manual_seed(hash_seed(0x72656164))  # not one that latents are drawn with
            noise = torch.randn(self.reference.shape[1:], generator=generator)[None]
        t = torch.as_tensor(t, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        clean, noise = (rows_like(x, index, like) for x in (self.reference, noise))
        return interpolant.interpolate(clean, noise, t.expand(len(like))).to(like.dtype)

    def _check(self, name, shape):
        for field, value in (("reference", self.reference), ("noise", self.noise)):
            if value is None:
                continue
            check_rows(f"targets[{name!r}].{field}", value, shape)
            if len(shape) == 3 and value.ndim != 4:  # tokens have no height and width, which the head's grid needs
                raise ValueError(
                    f"targets[{name!r}].{field} has shape {tuple(value.shape)}: accepted are unpacked latents "
                    "(1 or B, C, H, W)"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class AppearanceTarget(ReferenceTarget):
    """Pull the appearance towards a reference's.

    Args:
        head, weight, reference, noise: see :class:`CorrespondenceTarget`.
        pool: compare averages over pixels, so that positions do not matter.
        box, reference_box: ``(top, left, bottom, right)`` in latents: what is compared of the sample and the reference.
    """

    pool: bool = False
    box: Box | None = None
    reference_box: Box | None = None

    def _check(self, name, shape):
        super()._check(name, shape)
        rows, columns = self.size(shape)
        for field, box in (("box", self.box), ("reference_box", self.reference_box)):
            if box is not None and not (0 <= box[0] < box[2] <= rows and 0 <= box[1] < box[3] <= columns):
                raise ValueError(
                    f"targets[{name!r}].{field}={box!r}: accepted is (top, left, bottom, right) within {rows} x "
                    f"{columns} latents"
                )

    def loss(self, readout, reference, index, span):
        size = readout.shape[-2:]
        own, reference = _cut(readout, self.box, size), _cut(reference, self.reference_box, size)
        if self.pool:
            own, reference = (x.mean((2, 3), keepdim=True) for x in (own, reference))
        return appearance_loss(own, reference, span)


@dataclass(frozen=True, kw_only=True, eq=False)
class CorrespondenceTarget(ReferenceTarget):
    """Move what is at some points of a reference to other points.

    Args:
        head: a feature head; read without the timestep if its ``temb_convention`` is ``none``.
        weight: among several targets.
        reference: clean samples ``(1 or B, C, H, W)`` in the denoiser's space; of packed latents, unpacked.
        noise: with which they are noised to each time; by default the same draw in every run.
        points: ``(K, 2, 2)`` or ``(1 or B, K, 2, 2)``, pairs of ``(row, column)`` in latents: from, to.
    """

    points: Tensor

    def _check(self, name, shape):
        super()._check(name, shape)
        points, (rows, columns) = self._pairs(), self.size(shape)
        if points.ndim != 4 or points.shape[2:] != (2, 2) or not points.shape[1] or points.is_floating_point():
            raise ValueError(
                f"targets[{name!r}].points has shape {tuple(self.points.shape)} and type {self.points.dtype}; accepted "
                "are integers (K, 2, 2): pairs of (row, column)"
            )
        self._rows(name, "points", points, shape)
        if points.min() < 0 or points[..., 0].max() >= rows or points[..., 1].max() >= columns:
            raise ValueError(
                f"targets[{name!r}].points reach from {points.flatten(0, 2).amin(0).tolist()} to "
                f"{points.flatten(0, 2).amax(0).tolist()}; accepted is within {rows} x {columns} latents"
            )

    def _pairs(self) -> Tensor:
        return self.points[None] if self.points.ndim == 3 else self.points

    def loss(self, readout, reference, index, span):
        return correspondence_loss(readout, reference, rows_of(self._pairs(), index).to(readout.device))


def _cut(features: Tensor, box: Box | None, size) -> Tensor:
    if box is None:
        return features
    top, left, bottom, right = box
    return F.interpolate(features[:, :, top:bottom, left:right], size=size, mode="bilinear", align_corners=False)
