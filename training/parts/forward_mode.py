"""Derivatives of a network along a direction: by which means, and what stands in the way of the exact ones.

``dual``: dual numbers (:mod:`genkit.training.parts.dual`), exact. ``func``: ``torch.func.jvp``, exact, for more
functions, at about twice the cost once it is backpropagated. ``finite_difference``: central differences, any kernel,
any network. ``auto``: the first of these that the network and the machine allow.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from genkit import kernels
from genkit.attention.sdpa import scaled_dot_product_attention
from genkit.training.parts.dual import NoRule, dual_jvp

logger = logging.getLogger("genkit.training")

Exact = Literal["dual", "func"]
Jvp = Literal["auto", "dual", "func", "finite_difference"]

# By which means each network was found to be differentiable, by what was asked for.
_FOUND: "WeakKeyDictionary[nn.Module, dict[str, Jvp]]" = WeakKeyDictionary()
# PyTorch's own attention is replaced while derivatives are taken, ours has them; those of other packages have none.
_DIFFERENTIABLE = (None, "genkit", "native", "_native_math", "_native_efficient", "_native_cudnn", "_native_flash")


def obstacle(network: nn.Module, how: Exact) -> str | None:
    """Why ``network`` has no exact derivative by ``how``, and what to do about it; ``None`` where it has one."""
    for module in network.modules():
        name = type(module).__name__
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            return f"{name} is compiled; give the network as it was before torch.compile"
        processor: Any = getattr(module, "processor", None)
        backend = getattr(processor, "_attention_backend", None)
        backend = getattr(backend, "value", backend)
        if backend not in _DIFFERENTIABLE or "xformers" in type(processor).__name__.lower():
            return (
                f"attention of {name} runs on {backend or type(processor).__name__}, which has no forward mode; call "
                "set_attention_backend('native'), or disable_xformers_memory_efficient_attention()"
            )
        if how == "func" and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            return f"gradient checkpointing of {name} is on, and torch.func.jvp cannot go through it; switch it off"
    for key, weight in network.named_parameters():
        if type(weight.data) is not Tensor or not (weight.is_floating_point() or weight.is_complex()):
            kind = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
            return f"the weight {key} is quantised or in shards ({kind}); train whole floating-point weights"
    return None


def exact_jvp(fn: Callable, primals: tuple, tangents: tuple, how: Exact) -> tuple[Tensor, Tensor]:
    """``(fn(*primals), d/dh fn(*(p + h q)))`` along ``tangents`` ``q``.

    Raises:
        NoRule: something in ``fn`` has no rule in dual numbers.
    """
    if how == "dual":
        return dual_jvp(fn, primals, tangents)
    # What calls PyTorch's attention out of the mode's sight, as torch.nn.MultiheadAttention does, gets the slow one.
    with sdpa_kernel(SDPBackend.MATH), _Differentiable():
        # Expanded inputs are refused by functorch ("single memory location").
        moved = torch.func.jvp(fn, tuple(p.contiguous() for p in primals), tuple(q.contiguous() for q in tangents))
        return moved[0], moved[1]


class _Differentiable(TorchFunctionMode):
    """Functions of which PyTorch has no forward mode, or a wrong one, by others of the same value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    """In elementary steps: gradients of what forward mode makes of the fused one are wrong.

    PyTorch holds mean and variance constant there, https://github.com/pytorch/pytorch/issues/196700.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_REPLACED: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}


def differentiate(
    fn: Callable, primals: tuple, tangents: tuple, how: Jvp, network: nn.Module | None
) -> tuple[Tensor, Tensor] | None:
    """As :func:`exact_jvp`; ``None`` where it is left to finite differences.

    ``auto`` decides at the first derivative of ``network``, and logs what it chose, and why.

    Raises:
        ValueError: ``dual`` or ``func`` for a network that does not allow it, with what to do.
    """
    found = {} if network is None else _FOUND.setdefault(network, {})
    way = found.get(how, how)
    if way == "finite_difference":
        return None
    if way != "auto" and (network is None or how in found):
        return exact_jvp(fn, primals, tangents, way)
    reasons: list[str] = []
    for candidate in get_args(Exact) if how == "auto" else (how,):
        reason = None if network is None else obstacle(network, candidate)
        if how == "auto" and torch.compiler.is_compiling():
            reason = "the method is compiled"
        if reason is None:
            try:
                result = exact_jvp(fn, primals, tangents, candidate)
            except NoRule as error:
                reason = f"{error}" + ("" if how == "auto" else "; use func")
            else:
                found[how] = candidate
                break
        reasons += [] if reason in reasons else [reason]
    else:
        if how != "auto":
            raise ValueError(f"jvp={how!r}: {reasons[0]}, or set objective.jvp=finite_difference")
        found[how], result = "finite_difference", None
    if how == "auto" and (network is not None or reasons):
        logger.info("jvp=auto differentiates by %s", _choice(found[how], primals[0].device, reasons))
    return result


def _choice(way: Jvp, device: torch.device, reasons: list[str]) -> str:
    why = f": {'; '.join(reasons)}" if reasons else ""
    if way == "finite_difference":
        return way + why
    return f"{way}{why}; attention is {'fused' if kernels.fused(device) else 'eager'}"
