"""Attention that carries tangents: fused on GPUs, eager anywhere, and a backend of unmodified networks."""

from genkit.attention.functional import attention, attention_with_tangent

__all__ = ["attention", "attention_with_tangent"]
