"""Checks that settings of plain classes share."""

import math
from numbers import Integral, Real


def check_integer(setting: str, value: object) -> None:
    """Raise ``ValueError`` naming ``setting`` unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{setting}={value!r}: must be an integer")


def check_number(setting: str, value: object) -> None:
    """Raise ``ValueError`` naming ``setting`` unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{setting}={value!r}: must be a finite number")
