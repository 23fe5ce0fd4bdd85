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

from genkit._diffusers import active_backend


def reroute(module: nn.Module, name: str, compute: Callable[..., Tensor], active: Any = None) -> None:
    """Send a module's attention to the backend ``name``; undone by giving the module its class back.

    Args:
        compute: the backend, called as PyTorch's own; that itself sends attention back where it belongs.
        active: the member of Diffusers' dispatcher that is active meanwhile, for code that asks it.

    Raises:
        RuntimeError: something else has changed the module's class since an earlier call.
    """
    before: Any = type(module)
    if rerouted_to(module) is not None and "_rerouted" not in vars(before):
        raise RuntimeError(f"the class of a {before.__name__} was changed later than its backend; undo that first")
    original = getattr(before, "_rerouted", (before,))[0]
    plain = compute is F.scaled_dot_product_attention and active is None
    module.__class__ = original if plain else _rerouted(original, name, compute, active)


def rerouted_to(module: nn.Module) -> str | None:
    """The backend that a module's own calls of PyTorch's attention are sent to, if they are."""
    return getattr(type(module), "_rerouted", (None, None))[1]


def unrerouted(module: nn.Module) -> type:
    """A module's class without the backend that it was rerouted to."""
    return vars(type(module)).get("_rerouted", (type(module),))[0]


@cache
def _rerouted(original: Any, name: str, compute: Callable[..., Tensor], active: Any) -> Any:
    inner = original.forward

    @wraps(inner)
    def forward(self, *args, **kwargs):
        with _Answering(compute), nullcontext() if active is None else active_backend(active):
            output = inner(self, *args, **kwargs)
        # Up to PyTorch 2.13 a GroupNorm behind it has no forward mode for the strides of tokens made into an image.
        return output.contiguous() if isinstance(output, Tensor) and output.ndim == 4 else output

    same = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {"forward": forward, "_rerouted": (original, name), **same})


class _Answering(TorchFunctionMode):
    def __init__(self, compute: Callable[..., Tensor]):
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.compute if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))
