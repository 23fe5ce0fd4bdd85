"""Modules that call PyTorch's attention themselves, sent to a backend: Diffusers' old ``Attention``, and any other.

While such a module computes, its calls of ``scaled_dot_product_attention`` are answered by the backend. So every
processor keeps its meaning, with norms, added projections, residuals and masks. The module's class is replaced by a
subclass of the same name, so that copies compute with their own weights, and names of weights stay.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from genkit import _diffusers


def reroute(module: nn.Module, compute: Callable[..., Tensor], active: Any = None) -> Callable[[], None]:
    """Send a module's attention to ``compute``, which is called as PyTorch's own; return what undoes it.

    ``active`` is the member of Diffusers' dispatcher that is active meanwhile, for code that asks it.

    The undoing raises RuntimeError where the module's class has been changed since.
    """
    before = type(module)
    original = getattr(before, "_rerouted_from", before)
    after = (
        original
        if compute is F.scaled_dot_product_attention and active is None
        else _rerouted(original, compute, active)
    )

    def undo() -> None:
        if type(module) is not after:
            raise RuntimeError(
                f"the class of {after.__name__} was changed after its attention backend; undo the later change first"
            )
        module.__class__ = before

    module.__class__ = after
    return undo


@cache
def _rerouted(original: type, compute: Callable[..., Tensor], active: Any) -> type:
    inner = original.forward

    @wraps(inner)
    def forward(self, *args, **kwargs):
        with _Answering(compute), nullcontext() if active is None else _diffusers.active_backend(active):
            output = inner(self, *args, **kwargs)
        # Up to PyTorch 2.13 a GroupNorm behind it has no forward mode for the strides of tokens made into an image.
        return output.contiguous() if isinstance(output, Tensor) and output.ndim == 4 else output

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "_rerouted_from": original}
    return type(original.__name__, (original,), {"forward": forward, **names})


class _Answering(TorchFunctionMode):
    def __init__(self, compute: Callable[..., Tensor]):
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.compute if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))
