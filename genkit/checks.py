"""Checks that settings of plain classes share."""

import math
from numbers import Integral, Real


def check_integer(setting: str, value: object) -> None:
    """Raise ``ValueError`` naming ``setting`` unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{setting}={value!r}: must be an integer")


def check_counts(**settings: object) -> None:
    """Raise ``ValueError`` naming the first of ``settings`` that is no integer of at least 1."""
    for name, value in settings.items():
        check_integer(name, value)
        if value < 1:  # type: ignore[operator]
            raise ValueError(f"{name}={value}: must be at least 1")


def check_number(setting: str, value: object) -> None:
    """Raise ``ValueError`` naming ``setting`` unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{setting}={value!r}: must be a finite number")
