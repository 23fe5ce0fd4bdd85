"""Quantizers behind one interface: a file a quantizer, found by its file's name."""

from typing import Any

from pydantic import ValidationError

from genkit.quantizers.base import Quantized, Quantizer
from genkit.registry import lookup, member_class, members, unknown

__all__ = ["Quantized", "Quantizer", "make", "names"]


def __getattr__(name: str):
    return member_class(__name__, Quantizer, name)


def names() -> list[str]:
    """Names of the quantizers."""
    return sorted(members("genkit.quantizers", Quantizer))


def make(kind: str, **settings: Any) -> Quantizer:
    """The quantizer called ``kind`` with its ``settings``.

    Raises:
        ValueError: an unknown name; a setting that is unknown, missing or not accepted.
    """
    cls = lookup("genkit.quantizers", Quantizer, kind, setting="quantizer")
    fields = cls.Config.model_fields
    for name in settings:
        if name not in fields:
            raise ValueError(unknown(f"quantizer {kind!r}: setting", name, fields))
    try:
        return cls(**settings)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"quantizer {kind!r}: {wrong}") from None
