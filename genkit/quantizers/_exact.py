"""What all searches for the nearest code end with: float64 decides between the codes that bounds do not tell apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Measure = Literal["euclidean", "cosine", "dot"]


@dataclass(frozen=True)
class Codes:
    """A codebook ``(K, D)`` under a measure, and the offset that bounds take from codes and vectors.

    What is computed exactly is ``|z - c|^2`` or ``-2 z.c``; bounds are of it less ``|z - offset|^2``, or of it.
    """

    codebook: Tensor
    measure: Measure
    offset: Tensor

    @classmethod
    def of(cls, codebook: Tensor, measure: Measure, work: torch.dtype) -> "Codes":
        """``work`` is the type that bounds are computed in."""
        offset = codebook.new_zeros(codebook.shape[1], dtype=work)
        if measure == "euclidean":  # any vector will do: one near the codes keeps differences of large numbers apart
            offset = codebook[:: max(1, len(codebook) // 4096)].to(work).mean(0)
        return cls(codebook, measure, offset)

    @property
    def euclidean(self) -> bool:
        return self.measure == "euclidean"

    def scaled(self, codes: Tensor) -> Tensor:
        return F.normalize(codes.double(), dim=-1) if self.measure == "cosine" else codes

    def centred(self, codes: Tensor) -> Tensor:
        """``c'``, from which products are made; the offset is one only where distances do not change by it."""
        return (self.scaled(codes) - self.offset).to(self.offset.dtype)

    def decide(
        self,
        z: Tensor,
        least: Tensor,
        members: Callable[[Tensor, Tensor], Tensor],
        size: Tensor,
        longest: Tensor,
        most: int,
        unlisted: Tensor | None = None,
    ) -> Tensor:
        """The nearest code of each vector, the lowest of a tie, ``(N,)``; -1 where that is not sure.

        Args:
            z: ``(N, D)``.
            least: ``(G, N)``, what no code of a group comes below; overwritten.
            members: ``(rows, groups) -> (P, codes a group)`` int64, the codes of ``groups[i]`` of row ``rows[i]``.
            size: ``|z'|`` of each vector; ``longest`` is the largest ``|c'|``.
            most: groups besides the best that may be compared for one vector.
            unlisted: ``(N,)``, what no code outside all groups comes below.
        """
        n, work = len(z), least.dtype
        rows = torch.arange(n, device=z.device)
        nearest = least.argmin(0)
        value, index = self._exactly(z, rows, nearest, members)
        known = value
        if self.euclidean:
            square = (z.double() - self.offset).square().sum(1)
            known = value - square + 2.0**-44 * (value + square)
        tiny = torch.finfo(work).tiny * 2**20 * (1 + size + longest)
        known = (known + 2.0**-21 * known.abs() + tiny).to(work)
        least[nearest, rows] = torch.inf
        near = (least > known).logical_not_()  # what is not a number counts as near
        unsure = torch.zeros(n, dtype=torch.bool, device=z.device)
        if unlisted is not None:
            unsure = (unlisted > known).logical_not_()
            near.masked_fill_(unsure, False)
        if int(near.count_nonzero()) > most * n:  # too many to list
            unsure |= near.sum(0) > most
            near.masked_fill_(unsure, False)
        others, owners = near.nonzero().unbind(1)
        if len(owners):
            unsure |= owners.bincount(minlength=n) > most
            others, owners = others[~unsure[owners]], owners[~unsure[owners]]
            further, candidates = self._exactly(z, owners, others, members)
            best = value.scatter_reduce(0, owners, further, "amin")
            index = torch.where(value == best, index, len(self.codebook))
            tied = further == best[owners]
            index = index.scatter_reduce(0, owners[tied], candidates[tied], "amin")
        return index.masked_fill(unsure, -1)

    def _exactly(
        self, z: Tensor, rows: Tensor, groups: Tensor, members: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The least value and its lowest code, in float64, of group ``groups[i]`` for vector ``rows[i]``."""
        values, found = [], []
        some = max(1, 2**20 // (members(rows[:0], groups[:0]).shape[1] * z.shape[1]))
        for row, group in zip(rows.split(some), groups.split(some), strict=True):
            codes_of = members(row, group)
            codes, x = self.scaled(self.codebook[codes_of]).double(), z[row, None].double()
            d = (x - codes).square_().sum(2) if self.euclidean else -2 * (x * codes).sum(2)
            at = d.argmin(1, keepdim=True)
            values.append(d.gather(1, at)[:, 0])
            found.append(codes_of.gather(1, at)[:, 0])
        return torch.cat(values), torch.cat(found)
