"""Counter-based randomness: what item ``i`` draws depends on ``(seed, i)`` alone.

Batch size, rank, world size, device and neighbours do not enter, so a batch of four equals four batches of one.
Bits come from SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), whose
output is a pure function of a counter and is computed here with vectorised int64 arithmetic on any device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``value``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 bits; torch's ``>>`` is arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix_int(x: int) -> int:
    """:func:`_mix` on one Python integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hash_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every one of ``parts`` (integers) and their order."""
    x = 0
    for part in parts:
        x = _mix_int((x + _GOLDEN + _mix_int(int(part) & _MASK)) & _MASK)
    return x >> 1


class ItemRNG:
    """Draws for a batch of items: row ``i`` of every draw is a pure function of ``(seed, items[i], draw number)``.

    Args:
        seed: seed of the run.
        items: identities of the rows, int64 of shape ``(B,)`` (a sequence or range is converted).
        device: where draws are made; the bits are the same everywhere.

    Successive draws are independent; two instances with equal arguments repeat the same draws.
    """

    def __init__(self, seed: int, items: Tensor | Sequence[int], device: torch.device | str | None = None):
        items = torch.as_tensor(items, dtype=torch.int64, device=device)
        if items.ndim != 1:
            raise ValueError(f"items must have shape (B,), got {tuple(items.shape)}")
        self.seed = int(seed)
        self.items = items
        # Hashing twice keeps streams of neighbouring items and seeds far apart on SplitMix64's one cycle.
        self._keys = _mix(_mix(items + _signed(_GOLDEN)) ^ _signed(hash_seed(seed)))
        self._draws = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index) -> "ItemRNG":
        """The generator of some of the rows, at the same point of their streams."""
        part = ItemRNG(self.seed, self.items[index])
        part._draws = self._draws
        return part

    def _bits(self, n: int) -> Tensor:
        """64 random bits as int64, shape ``(B, n)``."""
        self._draws += 1
        keys = _mix(self._keys + _signed(self._draws * 0xD1342543DE82EF95))
        counter = torch.arange(1, n + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
        return _mix(keys[:, None] + counter)

    def uniform(self, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws on the open interval (0, 1), shape ``(B, *shape)``."""
        bits = self._bits(math.prod(shape))
        if dtype == torch.float64:
            u = (((bits >> 12) & 0xFFFFFFFFFFFFF).to(torch.float64) + 0.5) * 2.0**-52
        else:  # 23 bits, so that neither end rounds to 0 or 1 in float32
            u = ((((bits >> 41) & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23).to(dtype)
        return u.view(len(self), *shape)

    def normal(self, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws by Box and Muller's transform, shape ``(B, *shape)``."""
        n = math.prod(shape)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        bits = self._bits((n + 1) // 2)
        # The radius takes the high 32 bits and the angle the low 32: tails reach 6.7 standard deviations.
        radius = (((bits >> 32) & 0xFFFFFFFF).to(work) + 0.5).mul_(2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(work).mul_(2 * math.pi * 2.0**-32)
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return pairs.flatten(1)[:, :n].reshape(len(self), *shape).to(dtype)

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Integers in ``[0, high)``, int64 of shape ``(B, *shape)``."""
        if high < 1:
            raise ValueError(f"high={high}: must be at least 1")
        bits = (self._bits(math.prod(shape)) >> 1) & (_MASK >> 1)
        return (bits % high).view(len(self), *shape)

    def generators(self) -> list[torch.Generator]:
        """One CPU ``torch.Generator`` a row, for Diffusers code that takes a list of generators."""
        return [torch.Generator().manual_seed(hash_seed(self.seed, int(i), 0x67656E)) for i in self.items.tolist()]
