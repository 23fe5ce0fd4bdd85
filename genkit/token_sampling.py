"""From logits to a token: temperature, the k likeliest, the likeliest that make up a share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.checks import check_integer, check_number


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn.

    Args:
        guidance_scale: ``w >= 0`` of ``l_n + w (l_c - l_n)``, on logits, before all that follows; 1 is none.
        guidance_end: tokens before this number are guided; by default all.
        temperature: logits are divided by it; 0 takes the likeliest.
        top_k: only so many likeliest tokens, and any as likely as the last of them; 0 is all.
        top_p: of what remains, in order of probability, each that less than this share comes before; 1 is all.

    Raises:
        ValueError: a value outside of these.
    """

    guidance_scale: float = 1.0
    guidance_end: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_p"):
            check_number(name, getattr(self, name))
        check_integer("top_k", self.top_k)
        if self.guidance_end is not None:
            check_integer("guidance_end", self.guidance_end)
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale}: expected 0 or more")
        if self.guidance_end is not None and self.guidance_end < 0:
            raise ValueError(f"guidance_end={self.guidance_end}: expected 0 or more tokens")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0, for all, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share above 0, up to 1")

    def guided(self, token: int) -> bool:
        """Whether this token is drawn under guidance."""
        return self.guidance_scale != 1 and (self.guidance_end is None or token < self.guidance_end)

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(B, V)``, float64, of logits ``(B, V)``.

        The order is temperature, ``top_k``, ``top_p`` on what it leaves, as in Sun et al., arXiv 2406.06525, whose
        code this agrees with.
        """
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=1, descending=True, stable=True)
            before = ordered.cumsum(1) - ordered
            p = torch.zeros_like(p).scatter_(1, order, ordered.masked_fill(before > self.top_p, 0.0))
        return p

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens ``(B, 1)``: the quantiles of ``uniform`` ``(B, 1)`` in (0, 1), float64."""
        levels = self.probabilities(logits).cumsum(1)
        # Of the last sum, which rounding or a filter leaves below 1: so no token of probability 0 is drawn.
        return torch.searchsorted(levels, uniform * levels[:, -1:]).clamp(max=logits.shape[1] - 1)
