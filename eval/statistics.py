"""Streaming mean and covariance of features, mergeable across batches and processes."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 4096  # rows in float64 at a time


def own_rows(n: int, process_index: int, num_processes: int) -> Tensor:
    """Which of n rows are this process's: neighbours, each row once over all processes, and none to fill up."""
    return torch.arange(n).tensor_split(num_processes)[process_index]


def is_statistics(path: str | Path) -> bool:
    """Whether ``path`` is an ``.npz`` with statistics in it, rather than one with images or no ``.npz`` at all."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return "mu.npy" in file.namelist()


class FeatureStats:
    """Count, mean and scatter of feature rows in float64.

    With M = sum (x - mean)(x - mean)^T, two sets a and b merge exactly:
    delta = mean_b - mean_a, n = n_a + n_b, mean = mean_a + delta n_b / n, M = M_a + M_b + delta delta^T n_a n_b / n
    (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979). A sum of
    outer products minus n mean mean^T, the usual shortcut, cancels when the mean is large.

    ``n`` is None only for statistics read from a file that does not say how many images it was made from; those have a
    covariance, but cannot be updated or merged.
    """

    def __init__(self, dim: int):
        self.n: int | None = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self.meta: dict = {}
        self._covariance: Tensor | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """M / (n - 1), shape ``(d, d)``. Raises ``ValueError`` for n < 2."""
        if self.n is None:
            assert self._covariance is not None
            return self._covariance
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got n={self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Tensor) -> "FeatureStats":
        """Add rows ``(B, d)`` of any float dtype, in place. Raises ``ValueError`` on another d or a row not finite."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}), got {tuple(features.shape)}")
        rows = features.detach().cpu()
        bad = (~rows.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"feature row {(self.n or 0) + int(bad[0])} is not finite ({len(bad)} such rows in this batch)"
            )
        for chunk in rows.split(_CHUNK) if len(rows) else ():
            chunk = chunk.double()
            mean = chunk.mean(0)
            centred = chunk - mean
            self._add(len(chunk), mean, centred.T @ centred)
        return self

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """The statistics of both sets together, as a new object, with what both say of themselves (``meta``).

        Raises:
            ValueError: of other dimensions, of another extractor, or of n unknown.
        """
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {self.dim} and {other.dim} dimensions")
        made = [part.meta["extractor"] for part in (self, other) if "extractor" in part.meta]
        if len(set(made)) > 1:
            raise ValueError(f"cannot merge statistics of extractors {made[0]!r} and {made[1]!r}")
        merged = FeatureStats(self.dim)
        merged.meta = {k: v for k, v in self.meta.items() if other.meta.get(k) == v}
        return merged._joined(self)._joined(other)

    def gather(self, group: Any = None) -> "FeatureStats":
        """The statistics of the rows of all processes of ``group``, the same on each; alone, a copy.

        Counts, means and scatters travel, one process at a time in the order of their ranks, never features. Rows that
        a sampler repeats to fill up a batch must not have been added: :func:`own_rows` gives each process its own.

        Raises:
            ValueError: on every process, where one has other dimensions or does not know its n.
        """
        merged = FeatureStats(self.dim)
        merged.meta = dict(self.meta)
        if not (dist.is_available() and dist.is_initialized()):
            return merged._joined(self)
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        own = torch.tensor([-1 if self.n is None else self.n, self.dim], device=device)
        counts = [torch.empty_like(own) for _ in ranks]
        dist.all_gather(counts, own, group)
        for rank, (n, dim) in zip(ranks, torch.stack(counts).tolist(), strict=True):  # all see it, and all raise
            if n < 0 or dim != counts[0][1]:
                raise ValueError(f"process {rank} has statistics of {dim} dimensions, n={n if n >= 0 else None}")
        for rank, n in zip(ranks, torch.stack(counts)[:, 0].tolist(), strict=True):
            part = FeatureStats(self.dim)
            part.n, part.mean, part.scatter = n, self.mean.to(device).clone(), self.scatter.to(device).clone()
            dist.broadcast(part.mean, rank, group)
            dist.broadcast(part.scatter, rank, group)
            part.mean, part.scatter = part.mean.cpu(), part.scatter.cpu()
            merged._joined(part)
        return merged

    def _joined(self, part: "FeatureStats") -> "FeatureStats":
        if part.n is None:
            raise ValueError("cannot merge statistics that do not say their n; load them with n=")
        if part.n:
            self._add(part.n, part.mean, part.scatter)
        return self

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self.n is None:
            raise ValueError("cannot update statistics that do not say their n; load them with n=")
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.scatter = (self.scatter + scatter).addr_(delta, delta, alpha=self.n * n / total)
        self.n = total

    def save(self, path: str | Path, meta: dict | None = None) -> None:
        """Write ``.npz`` with ``mu``, ``sigma`` (as clean-fid, pytorch-fid, ADM do), ``n`` and JSON ``meta``."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.n is not None:
            arrays["n"] = np.array(self.n)
        with open(path, "wb") as file:
            np.savez(file, meta=np.array(json.dumps({**self.meta, **(meta or {})})), **arrays)

    @classmethod
    def load(cls, path: str | Path, n: int | None = None, extractor: str | None = None) -> "FeatureStats":
        """Read ``.npz`` with ``mu`` and ``sigma``: our own, or one of clean-fid, pytorch-fid or ADM's evaluator.

        Those of other libraries say neither how many images they are of nor what made the features: ``n`` and
        ``extractor``, an ``Extractor.id``, supply it. What else is in the file (ADM's images and its statistics of
        spatial features, ``mu_s`` and ``sigma_s``) is left alone.

        Raises:
            ValueError: not such a file; arrays that do not fit each other, or no covariance; an ``n`` or ``extractor``
                other than the file's.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("mu", "sigma", "n", "meta") if key in file}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path}: not a readable .npz of feature statistics ({error})") from error
        if "mu" not in arrays or "sigma" not in arrays:
            raise ValueError(f"{path}: statistics need arrays 'mu' and 'sigma'")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[k], dtype=np.float64)) for k in ("mu", "sigma"))
        if mean.ndim != 1 or tuple(covariance.shape) != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit together")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path}: mu or sigma is not finite")
        if (covariance - covariance.T).abs().max() > 1e-4 * covariance.abs().max() or covariance.diagonal().min() < 0:
            raise ValueError(f"{path}: sigma is not symmetric or has a negative variance, so it is no covariance")
        stored = int(arrays["n"]) if "n" in arrays else None
        if n is not None and stored is not None and n != stored:
            raise ValueError(f"{path}: n={n} was given, but the file says n={stored}")
        count = stored if n is None else n
        if count is not None and count < 2:
            raise ValueError(f"{path}: statistics need n >= 2, got n={count}")
        stats = cls(len(mean))
        stats.n, stats.mean = count, mean
        if count is None:
            stats._covariance = covariance
        else:
            stats.scatter = covariance * (count - 1)
        stats.meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        if extractor is not None and stats.meta.setdefault("extractor", extractor) != extractor:
            made_with = stats.meta["extractor"]
            raise ValueError(f"{path}: extractor={extractor!r} was given, but the file says {made_with!r}")
        return stats
