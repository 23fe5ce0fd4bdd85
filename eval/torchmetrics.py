"""Metrics of genkit as ``torchmetrics.Metric``: for Lightning, and wherever torchmetrics gathers across processes.

Needs torchmetrics. Values are those that :func:`genkit.eval.evaluate` gives for the same images, in float64.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from genkit.eval.extractors.base import Extractor, Features, extract, get_extractor
from genkit.eval.inputs import read_images
from genkit.eval.metrics._per_image import PerImage
from genkit.eval.metrics.base import FeatureSet, get_metric
from genkit.eval.metrics.base import Metric as GenkitMetric
from genkit.eval.statistics import FeatureStats

_ROWS = ("features", "logits", "labels")


class SetMetric(torchmetrics.Metric):
    """A metric of two sets, or of the generated one: ``compute()`` gives its values by name.

    ``update(images, real=True)`` and ``update(images, real=False)``, any number of times in any order, then
    ``compute()``. Images are uint8, or float in [0, 1], ``(B, C, H, W)``. Statistics are merged exactly, rows gathered
    in the order of processes, so that several processes give what one would; each image must be given to one of them
    only (a sampler that fills up batches repeats some). ``forward`` is ``update``: a batch has no distance of its own.

    Args:
        metric: as :func:`genkit.eval.evaluate` takes it, by text or as an object, of features, logits or labels.
        extractor: likewise; or None where ``update`` is given features ``(B, dim)`` themselves (for metrics that read
            logits, those).
        dim: of the features, without an extractor.
        reset_real_features: whether ``reset`` forgets the reference, too.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: a metric that reads images or prompts (:class:`ImageMetric` takes those); logits of an extractor
            that has none; ``dim`` with an extractor, or neither.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        metric: str | GenkitMetric,
        extractor: str | Extractor | None,
        *,
        dim: int | None = None,
        reset_real_features: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.metric = get_metric(metric)
        reads = {"real": self.metric.reads_reference, "generated": self.metric.reads_generated}
        if other := {field for of in reads.values() for field in of} - {"stats", *_ROWS}:
            raise ValueError(f"metric={self.metric.name!r} reads {', '.join(sorted(other))}; see ImageMetric")
        if (extractor is None) == (dim is None):
            raise ValueError(f"extractor={extractor!r}, dim={dim}: accepted is one of them, dim for given features")
        self.extractor = None if extractor is None else get_extractor(extractor)
        self.dim: int = dim if self.extractor is None else self.extractor.dim  # type: ignore[assignment]  # one is given
        classes = dim if self.extractor is None else self.extractor.num_classes
        if "logits" in reads["real"] + reads["generated"] and classes is None:
            raise ValueError(f"metric={self.metric.name!r} needs logits; extractor={extractor!r} has none")
        self.reset_real_features = reset_real_features
        empty = {
            "features": torch.empty(0, self.dim),
            "logits": torch.empty(0, classes or 0),
            "labels": torch.empty(0, dtype=torch.long),
        }
        self._empty = {}
        for side, fields in reads.items():
            if "stats" in fields:
                self.add_state(f"{side}_stats", _packed(FeatureStats(self.dim)), dist_reduce_fx=_merged)
            for field in fields:
                if field in empty:
                    self.add_state(f"{side}_{field}", [], dist_reduce_fx="cat")
                    self._empty[f"{side}_{field}"] = empty[field]
        self._seed()

    def update(self, images: Tensor, real: bool | None = None, labels: Tensor | None = None) -> None:
        """Add images to a side.

        Args:
            images: uint8, or float in [0, 1], ``(B, C, H, W)``; without an extractor, features.
            real: which side; may be left out where the metric looks at generated images alone.
            labels: ``(B,)``, for metrics that read them.

        Raises:
            ValueError: no side where there are two, one that the metric does not look at, images or features of another
                form, rows that are not finite, labels that are missing or of another number.
        """
        two = bool(self.metric.reads_reference)
        if real is None and two or real and not two:
            accepted = "True (of the reference) or False" if two else "False: it looks at generated images alone"
            raise ValueError(f"real={real}: accepted by {self.metric.name!r} is {accepted}")
        side = "real" if real else "generated"
        reads = self.metric.reads_reference if real else self.metric.reads_generated
        found = self._given(images) if self.extractor is None else self._seen(images)
        rows = {"features": found.features, "logits": found.logits, "labels": labels}
        for field in reads:
            if field == "stats":
                new = _packed(FeatureStats(found.features.shape[1]).update(found.features))
                merged = _merged(torch.stack((getattr(self, f"{side}_stats"), new.to(self.device))))
                setattr(self, f"{side}_stats", merged)
            elif (of := rows[field]) is None or len(of) != len(images):
                raise ValueError(f"{field} of {len(images)} images: got {None if of is None else len(of)}")
            else:
                getattr(self, f"{side}_{field}").append(of.detach().to(self.device))

    def _given(self, rows: Tensor) -> Features:
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(rows.shape)}; accepted are (B, {self.dim})")
        return Features(rows.detach(), rows.detach())

    def _seen(self, images: Tensor) -> Features:
        assert self.extractor is not None
        (found,) = extract(self.extractor, [_uint8(images)], self.device)
        return found

    def compute(self) -> Any:
        """The values by name.

        Raises:
            ValueError: as the metric itself: too few images, mostly.
        """
        values = self.metric(self._side("real") if self.metric.reads_reference else None, self._side("generated"))
        return {name: self._number(value) for name, value in values.items()}

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """``update``."""
        self.update(*args, **kwargs)

    def reset(self) -> None:
        """Forget the generated images, and the real ones with ``reset_real_features``."""
        real = {n: getattr(self, n) for n in self._defaults if n.startswith("real_") and not self.reset_real_features}
        kept = {name: value if isinstance(value, Tensor) else list(value) for name, value in real.items()}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)
        self._seed()

    def _seed(self) -> None:
        """Every list begins with no rows: a process without any then has what the others gather from it."""
        for name, empty in self._empty.items():
            if not getattr(self, name):
                getattr(self, name).append(empty.to(self.device))

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _side(self, side: str) -> FeatureSet:
        packed = getattr(self, f"{side}_stats", None)
        stats = FeatureStats(self.dim) if packed is None else _unpacked(packed)
        if self.extractor is not None:
            stats.meta = {"extractor": self.extractor.id, "distance": self.extractor.distance}
        rows: dict[str, Any] = {}
        for field in _ROWS:
            held = getattr(self, f"{side}_{field}", None)  # a list, but where processes gathered theirs a tensor
            if held is not None:
                rows[field] = (torch.cat(held) if isinstance(held, list) else held).cpu()
        return FeatureSet(stats, **rows)


class _OneValue(SetMetric):
    """``compute()`` gives one number, as ``self.log`` wants it."""

    @abstractmethod
    def _main(self) -> str:
        """Its name among the metric's values."""

    def compute(self) -> Tensor:
        """The value: a scalar."""
        return super().compute()[self._main()]


class FrechetDistance(_OneValue):
    """:func:`genkit.eval.metrics.frechet.frechet_distance`, a scalar; no features are kept, only their statistics.

    Arguments are those of :class:`SetMetric` without ``metric``.

    Source: Heusel et al., arXiv 1706.08500.
    """

    higher_is_better = False

    def __init__(self, extractor: str | Extractor | None, **kwargs: Any):
        super().__init__("frechet", extractor, **kwargs)

    def _main(self) -> str:
        return "frechet_distance" if self.extractor is None else self.extractor.distance


class KernelInceptionDistance(_OneValue):
    """:func:`genkit.eval.metrics.kid.kid` over all pairs, a scalar; ``SetMetric("kid", ...)`` has the subsets, too.

    Source: Binkowski et al., arXiv 1801.01401.
    """

    higher_is_better = False

    def __init__(self, extractor: str | Extractor | None, **kwargs: Any):
        super().__init__("kid:subsets=0", extractor, **kwargs)

    def _main(self) -> str:
        return "kid"


class InceptionScore(_OneValue):
    """:func:`genkit.eval.metrics.inception_score.inception_score`, its mean over splits, a scalar.

    Only ``update(images)``. ``SetMetric("inception_score", ...)`` has the standard deviation, too.

    Source: Salimans et al., arXiv 1606.03498.
    """

    higher_is_better = True

    def __init__(self, extractor: str | Extractor | None, *, splits: int = 10, seed: int = 0, **kwargs: Any):
        super().__init__(f"inception_score:splits={splits},seed={seed}", extractor, **kwargs)

    def _main(self) -> str:
        return "inception_score"


class PrecisionRecallDensityCoverage(SetMetric):
    """:func:`genkit.eval.metrics.prdc.prdc`: four scalars by name.

    Sources: Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797.
    """

    higher_is_better = True

    def __init__(self, extractor: str | Extractor | None, *, pr_k: int = 3, dc_k: int = 5, **kwargs: Any):
        super().__init__(f"prdc:pr_k={pr_k},dc_k={dc_k}", extractor, **kwargs)


class ImageMetric(torchmetrics.Metric):
    """The mean over images of a metric that looks at each alone, or at each with the reference at its place: a scalar.

    ``forward`` gives the mean of the batch.

    Args:
        metric: PSNR, SSIM, LPIPS, a reward ...: as :func:`genkit.eval.evaluate` takes it, by text or as an object.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: a metric of sets (:class:`SetMetric` takes those).
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, metric: str | GenkitMetric, **kwargs: Any):
        super().__init__(**kwargs)
        made = get_metric(metric)
        if not isinstance(made, PerImage):
            raise ValueError(f"metric={made.name!r} is of whole sets; see SetMetric")
        self.metric = made
        # Sums merge exactly in any order to rounding, and hold no image.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        images: Tensor,
        reference: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Add images, and what the metric needs beside them.

        Raises:
            ValueError: something that it needs is missing or of another number, or images of another form.
        """
        sides = [None if x is None else _uint8(x) for x in (reference, images)]
        real, fake = (None if x is None else FeatureSet(FeatureStats(0), images=read_images(x.cpu())) for x in sides)
        assert fake is not None
        for name, given in (("prompts", prompts), ("labels", labels)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{name} of {len(images)} images: got {len(given)}")
        fake = FeatureSet(fake.stats, labels=labels, images=fake.images, prompts=prompts)
        if missing := self.metric.missing(set() if real is None else real.fields, fake.fields):
            raise ValueError(f"{self.metric.name!r} needs {', '.join(missing)}")
        (values,) = self.metric.values(real, fake).values()
        self.total = self.total + values.sum().to(self.device)
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        """The mean: a scalar."""
        if not self.count:
            raise ValueError(f"{self.metric.name!r}: no images were given")
        return self.total / self.count


def _uint8(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}; accepted are uint8, and floats in [0, 1]")
    low, high = (float(x) for x in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float images are taken in [0, 1], these reach from {low:g} to {high:g}")
    return (images.float() * 255).round().to(torch.uint8)


# One tensor of all three, since they can only be merged together: n in the first row, the mean, the scatter.
def _packed(stats: FeatureStats) -> Tensor:
    count = torch.full((1, stats.dim), float(stats.n or 0), dtype=torch.float64)
    return torch.cat((count, stats.mean[None], stats.scatter))


def _unpacked(packed: Tensor) -> FeatureStats:
    rows = packed.cpu()
    stats = FeatureStats(rows.shape[1])
    stats.n, stats.mean, stats.scatter = int(rows[0, 0]), rows[1].clone(), rows[2:].clone()
    return stats


def _merged(stacked: Tensor) -> Tensor:
    """Of ``(processes, d + 2, d)`` packed statistics those of all."""
    merged = FeatureStats(stacked.shape[2])
    for part in stacked:
        if part[0, 0]:
            merged = merged.merge(_unpacked(part))
    return _packed(merged).to(stacked.device)
