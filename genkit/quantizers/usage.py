"""How much of a codebook a whole set of images uses."""

import torch
from torch import Tensor

from genkit.quantizers import processes


class CodeUsage:
    """Counts of indices 0 to K - 1, added up over batches and processes.

    Over a window of N tokens even uniform indices use only ``1 - (1 - 1/K)^N`` of the codes (:attr:`expected`): usage
    is to be counted over a whole evaluation set, on all processes, and told beside that.
    """

    def __init__(self, codebook_size: int):
        if codebook_size < 1:
            raise ValueError(f"codebook_size={codebook_size}: expected at least 1")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, indices: Tensor) -> "CodeUsage":
        """Count ``indices`` of any shape.

        Raises:
            ValueError: one out of range.
        """
        flat = indices.detach().flatten().cpu()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(self.counts):
            raise ValueError(
                f"indices are {int(flat.min())} to {int(flat.max())}; accepted are 0 to {len(self.counts) - 1}"
            )
        self.counts += torch.bincount(flat, minlength=len(self.counts))
        return self

    def gather(self) -> "CodeUsage":
        """The counts of all processes together, on each."""
        merged = CodeUsage(len(self.counts))
        merged.counts = processes.add_up(self.counts)
        return merged

    @property
    def usage(self) -> float:
        """Share of the codes that occurred."""
        return (self.counts > 0).double().mean().item()

    @property
    def expected(self) -> float:
        """``usage`` in expectation if all codes were equally likely."""
        return 1 - (1 - 1 / len(self.counts)) ** int(self.counts.sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of the entropy of the indices: K if all occur equally often."""
        p = self.counts[self.counts > 0].double() / self.counts.sum()
        return (-(p * p.log()).sum()).exp().item()
