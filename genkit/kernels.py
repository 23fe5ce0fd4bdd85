"""Eager PyTorch or a fused kernel: which of the two computes, where there are both under one name.

``GENKIT_KERNELS``: ``auto`` (the default) takes the kernel on NVIDIA GPUs from Ampere on (compute capability 8.0) that
have Triton, and logs once why not on others; ``off`` takes eager code everywhere; ``on`` demands the kernel, on the CPU
in Triton's interpreter (``TRITON_INTERPRET=1``), and raises where there is none.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch.torch_version import TorchVersion

from genkit.registry import unknown

logger = logging.getLogger(__name__)

Mode = Literal["auto", "off", "on"]

_CAPABILITY = (8, 0)  # of which Triton compiles dots in bfloat16 and TF32
_SHARED = 99 * 1024  # bytes of a block: what every GPU of that capability has, and the smallest tiles are for

# Of the process, not of a thread or context: backward and what is recomputed in it run in threads of their own.
_chosen: Mode | None = None


def mode() -> Mode:
    """What :func:`choose` says, or else the variable.

    Raises:
        ValueError: the variable is neither ``auto``, ``off`` nor ``on``.
    """
    named = _chosen or os.environ.get("GENKIT_KERNELS", "auto")
    if named not in get_args(Mode):
        raise ValueError(unknown("GENKIT_KERNELS", named, get_args(Mode)))
    return named  # type: ignore[return-value]


@contextmanager
def choose(how: Mode) -> Iterator[None]:
    """Within, kernels are used as ``how`` says, whatever the variable is: in all threads of the process.

    Gradient checkpointing calls functions again in the backward, which had better be within, too.
    """
    global _chosen
    if how not in get_args(Mode):
        raise ValueError(unknown("kernels", how, get_args(Mode)))
    before, _chosen = _chosen, how
    try:
        yield
    finally:
        _chosen = before


def fused(device: torch.device) -> bool:
    """Whether what lies on ``device`` is computed by a fused kernel.

    Raises:
        RuntimeError: kernels are demanded (``on``) and there are none, with what to do.
    """
    how = mode()
    if how == "off" or (how == "auto" and device.type != "cuda"):
        return False
    reason = obstacle(device)
    if reason is None:
        return True
    if how == "on":
        raise RuntimeError(f"GENKIT_KERNELS=on: {reason}; or set GENKIT_KERNELS=off for eager code")
    say_eager(reason)
    return False


def obstacle(device: torch.device | str) -> str | None:
    """Why Triton's kernels do not run on ``device``, and what to do; ``None`` where they do."""
    device = torch.device(device)
    if (reason := _without_triton()) is not None:
        return reason
    if interpreted() and device.type in ("cpu", "cuda"):
        return _without_interpreter()
    if device.type != "cuda":
        return (
            f"triton has no kernels for {device.type!r}; TRITON_INTERPRET=1, set beforehand, interprets them on the CPU"
        )
    if torch.version.hip is not None:
        return "kernels are for NVIDIA GPUs, and this torch is for AMD's (ROCm); eager code runs there"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU; install a CUDA build of torch and a driver that it supports"
    gpu, shared = torch.cuda.get_device_properties(device), shared_memory(device)
    if (gpu.major, gpu.minor) < _CAPABILITY:
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, kernels need 8.0 (Ampere) or more; take a "
            "newer GPU"
        )
    if shared < _SHARED:
        return (
            f"{gpu.name} gives a block {shared // 1024} KiB of shared memory, kernels need {_SHARED // 1024}; take "
            "another GPU"
        )
    return None


def shared_memory(device: torch.device) -> int:
    """Shared memory that a block of threads can have, in bytes; that of Hopper's where there is no such thing."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def say_eager(reason: str) -> None:
    """Log once why there is no kernel for what is computed."""
    _log_once(reason)


@cache
def _log_once(reason: str) -> None:
    logger.warning("computing eagerly, without fused kernels: %s; GENKIT_KERNELS=off says so without a warning", reason)


@cache
def _without_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (it comes with CUDA builds of torch)"
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        return f"triton does not import ({type(error).__name__}: {error}); reinstall the one that your torch asks for"
    return None


@cache
def _without_interpreter() -> str | None:
    import numpy
    import triton

    # It takes an array of one number, the end of a loop, for a number, which NumPy refuses since 2.4.
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(numpy.__version__) >= "2.4":
        return (
            f"triton {triton.__version__} interprets no loops with numpy {numpy.__version__}; "
            "pip install 'numpy<2.4', or a later torch, which brings triton 3.7 or more"
        )
    return None


def interpreted() -> bool:
    """Whether Triton interprets kernels, which it decides when they are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


# torch.compile takes what they say as given. torch.compiler.assume_constant_result does this, and imports the compiler.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]
say_eager._dynamo_marked_constant = True  # type: ignore[attr-defined]
