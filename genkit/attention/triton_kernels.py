"""The five functions of fused attention that ``genkit.attention.autograd`` calls, in Triton."""

from genkit.attention._triton_backward import backward, backward_with_tangent
from genkit.attention._triton_forward import forward, forward_with_tangent, tangent

__all__ = ["backward", "backward_with_tangent", "forward", "forward_with_tangent", "tangent"]
