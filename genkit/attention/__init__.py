"""Attention that carries tangents: fused on GPUs, eager anywhere, and a backend of unmodified networks."""

from typing import TYPE_CHECKING

from genkit.attention.functional import attention, attention_with_tangent

if TYPE_CHECKING:
    from genkit.attention.backends import register_backend, use
    from genkit.attention.coverage import attention_coverage

__all__ = ["attention", "attention_coverage", "attention_with_tangent", "register_backend", "use"]


def __getattr__(name: str):  # these import Diffusers
    if name in ("register_backend", "use"):
        from genkit.attention import backends

        return getattr(backends, name)
    if name == "attention_coverage":
        from genkit.attention.coverage import attention_coverage

        return attention_coverage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
