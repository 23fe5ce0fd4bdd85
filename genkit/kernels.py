"""Eager PyTorch or a fused kernel: which of the two computes, where there are both under one name.

``GENKIT_KERNELS``: ``auto`` (the default) takes the kernel on CUDA devices that have Triton; ``off`` takes eager code
everywhere; ``on`` demands the kernel, on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``), and raises where
there is none.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, get_args

import torch

from genkit.registry import unknown

Mode = Literal["auto", "off", "on"]

_chosen: ContextVar[Mode | None] = ContextVar("genkit_kernels", default=None)


def mode() -> Mode:
    """What :func:`choose` says, or else the variable.

    Raises:
        ValueError: the variable is neither ``auto``, ``off`` nor ``on``.
    """
    named = _chosen.get() or os.environ.get("GENKIT_KERNELS", "auto")
    if named not in get_args(Mode):
        raise ValueError(unknown("GENKIT_KERNELS", named, get_args(Mode)))
    return named  # type: ignore[return-value]


@contextmanager
def choose(how: Mode) -> Iterator[None]:
    """Within, kernels are used as ``how`` says, whatever the variable is."""
    if how not in get_args(Mode):
        raise ValueError(unknown("kernels", how, get_args(Mode)))
    token = _chosen.set(how)
    try:
        yield
    finally:
        _chosen.reset(token)


def fused(device: torch.device) -> bool:
    """Whether what lies on ``device`` is computed by a fused kernel.

    Raises:
        RuntimeError: kernels are demanded (``on``) and there are none, with what to do.
    """
    how = mode()
    if how == "off" or (how == "auto" and device.type != "cuda"):
        return False
    reason = obstacle(device.type)
    if reason is not None and how == "on":
        raise RuntimeError(f"GENKIT_KERNELS=on: {reason}; or set GENKIT_KERNELS=off for eager code")
    return reason is None


def obstacle(device_type: str) -> str | None:
    """Why Triton's kernels do not run on devices of this type, and what to do; ``None`` where they do."""
    return _obstacle(device_type)


# torch.compile takes what it says as given. torch.compiler.assume_constant_result does this, and imports the compiler.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _obstacle(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (it comes with CUDA builds of torch)"
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return f"triton does not import ({type(error).__name__}: {error}); reinstall the one that your torch asks for"
    if device_type == "cuda" or interpreted():
        return None
    return f"triton has no kernels for {device_type!r}; TRITON_INTERPRET=1, set beforehand, interprets them on the CPU"


def interpreted() -> bool:
    """Whether Triton interprets kernels, which it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
