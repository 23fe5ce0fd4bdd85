"""Quantizers that another one consists of."""

from typing import Any

from torch import nn

from genkit.quantizers.base import Quantizer
from genkit.registry import lookup


def make_parts(owner: Quantizer, settings: dict[str, Any], *, dim: int, count: int) -> nn.ModuleList:
    """``count`` quantizers of ``settings``, by default of kind ``vq``.

    Those with a seed start apart, as they must: equal codebooks of the same residual would code the same.

    Raises:
        ValueError: settings that are not accepted, and whose part they are.
    """
    from genkit.quantizers import make

    given = dict(settings)
    kind, seed = given.pop("kind", "vq"), given.get("seed", 0)
    try:
        cls = lookup("genkit.quantizers", Quantizer, kind, setting="quantizer")
        seeded = "seed" in cls.Config.model_fields and isinstance(seed, int)  # of another type it is refused
        made = [make(kind, dim=dim, **given | ({"seed": seed + i} if seeded else {})) for i in range(count)]
    except ValueError as error:
        raise ValueError(f"quantizer {owner.settings['kind']!r}: the quantizer of its parts: {error}") from None
    return nn.ModuleList(made)
