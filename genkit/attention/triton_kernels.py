"""The five functions of fused attention that ``genkit.attention.autograd`` calls, in Triton."""

from genkit.attention._triton_forward import forward, forward_with_tangent, tangent

__all__ = ["forward", "forward_with_tangent", "tangent"]
