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
        raise ValueError(f"quantizer {kind!r}: {'; '.join(map(_said, error.errors()))}") from None


def _said(error: Any) -> str:
    setting, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{setting} is missing"
    return f"{setting}={error['input']!r}: {message}" if setting else message
