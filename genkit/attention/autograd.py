"""Derivatives of fused attention: what PyTorch is told, around kernels that know nothing of it.

:class:`Attention` has a backward and a forward-mode rule; the latter is a function of its own, :class:`Tangent`, with a
backward, so that ``torch.func.jvp``, dual levels, ``backward`` and the gradient of a jvp compose. Only what enters or
leaves a function can be saved for its backward, hence the outputs that nobody sees. Saved outputs are constants to
PyTorch, so a second derivative would be wrong without an error: every backward is a :class:`_Once`, which raises.

Kernels are told which gradients are needed, in the order ``q, k, v, bias, tq, tk, tv, tbias``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from genkit.attention.inputs import Inputs


def attention(inputs: Inputs, kernels: ModuleType | None = None) -> Tensor:
    """``o``, by the functions of ``kernels``."""
    q, k, v, mask, bias, options = inputs
    return Attention.apply(q, k, v, bias, mask, options, kernels or _triton(), torch.is_grad_enabled())[0]


def attention_with_tangent(
    inputs: Inputs,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    kernels: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """``(o, to)``, by the functions of ``kernels``."""
    q, k, v, mask, bias, options = inputs
    precise = torch.is_grad_enabled()
    outputs = Pair.apply(q, k, v, bias, mask, tq, tk, tv, tbias, options, kernels or _triton(), precise)
    return outputs[0], outputs[1]


def _triton() -> ModuleType:
    from genkit.attention import triton_kernels

    return triton_kernels


class _Unbatched(Function):
    """``torch.vmap`` over kernels is refused, and with it ``jacfwd``, ``jacrev`` and ``hessian``."""

    @staticmethod
    def vmap(*_) -> Any:
        raise RuntimeError(
            "fused attention has no torch.vmap, nor jacfwd or jacrev, which use it; give what is batched in the axis "
            "of batches, or take eager attention by eager=True or GENKIT_KERNELS=off"
        )


class Attention(_Unbatched):
    """``(q, k, v, bias, mask) -> (o, lse)``; ``lse`` is of scores, in natural logarithms, without derivative."""

    @staticmethod
    def forward(q, k, v, bias, mask, options, kernels, recording):
        return kernels.forward(q, k, v, bias, mask, options)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        q, k, v, bias, mask, ctx.options, ctx.kernels, ctx.recording = inputs  # type: ignore[attr-defined]
        o, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, mask, o, lse)
        ctx.save_for_forward(q, k, v, bias, mask, lse)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _) -> Any:
        if g is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:4]
        grads = _Once.apply(ctx.kernels.backward, *ctx.saved_tensors, g, ctx.options, needs)
        return *grads, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tq, tk, tv, tbias, *_) -> Any:
        q, k, v, bias, mask, lse = ctx.saved_tensors
        arguments = (q, k, v, bias, mask, lse, tq, tk, tv, tbias, ctx.options, ctx.kernels, ctx.recording)
        with torch.set_grad_enabled(ctx.recording):  # torch.func turns gradients on before it comes here
            return Tangent.apply(*arguments)[0], None


class Tangent(_Unbatched):
    """``(q, k, v, bias, mask, lse, tq, tk, tv, tbias) -> (to, mu, o, to)``, the last two in float32."""

    @staticmethod
    def forward(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, kernels, precise):
        return kernels.tangent(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, precise)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        q, k, v, bias, mask, lse, tq, tk, tv, tbias, ctx.options, ctx.kernels, _ = inputs  # type: ignore[attr-defined]
        to, mu, o, exact = output
        ctx.mark_non_differentiable(*(x for x in (mu, o, exact) if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, mask, tq, tk, tv, tbias, o, to if exact is None else exact, lse, mu)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, *_) -> Any:
        if h is None:
            return (None,) * 13
        needs = ctx.needs_input_grad[:4] + ctx.needs_input_grad[6:10]
        grads = _Once.apply(ctx.kernels.backward_with_tangent, *ctx.saved_tensors, None, h, ctx.options, needs)
        return *grads[:4], None, None, *grads[4:], None, None, None

    @staticmethod
    def jvp(ctx: Any, *_) -> Any:
        raise RuntimeError(_SECOND)


class Pair(_Unbatched):
    """``(q, k, v, bias, mask, tq, tk, tv, tbias) -> (o, to, lse, mu, o, to)``: the last in float32."""

    @staticmethod
    def forward(q, k, v, bias, mask, tq, tk, tv, tbias, options, kernels, precise):
        return kernels.forward_with_tangent(q, k, v, bias, mask, tq, tk, tv, tbias, options, precise)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        q, k, v, bias, mask, tq, tk, tv, tbias, ctx.options, ctx.kernels, _ = inputs  # type: ignore[attr-defined]
        o, to, lse, mu, exact, exact_tangent = output
        ctx.mark_non_differentiable(*(x for x in (lse, mu, exact, exact_tangent) if x is not None))
        ctx.set_materialize_grads(False)
        o, to = o if exact is None else exact, to if exact_tangent is None else exact_tangent
        ctx.save_for_backward(q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_) -> Any:
        return pair_gradients(ctx, g, h, lambda name, *rest: _Once.apply(getattr(ctx.kernels, name), *rest))

    @staticmethod
    def jvp(ctx: Any, *_) -> Any:
        raise RuntimeError(
            "fused attention_with_tangent has no forward mode, for its tangent is a derivative already; within "
            "torch.func.jvp or a dual level call genkit.attention.attention, or take eager attention by eager=True or "
            "GENKIT_KERNELS=off"
        )


def pair_gradients(ctx: Any, g: Tensor | None, h: Tensor | None, run: Callable[..., tuple]) -> tuple:
    """Gradients of twelve inputs, of which the first nine are those of :class:`Pair`, by the pass that is needed.

    ``ctx`` has what :class:`Pair` keeps; ``run(name, *arguments)`` is the kernels' function of this name.
    """
    q, k, v, bias, mask, *tangents, o, to, lse, mu = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4] + ctx.needs_input_grad[5:9]
    grads = (None,) * 8
    if h is not None:
        arguments = (q, k, v, bias, mask, *tangents, o, to, lse, mu, g, h, ctx.options, needs)
        grads = run("backward_with_tangent", *arguments)
    elif g is not None and any(needs[:4]):  # the tangent was not used: an ordinary backward
        grads = (*run("backward", q, k, v, bias, mask, o, lse, g, ctx.options, needs[:4]), *grads[4:])
    return *grads[:4], None, *grads[4:], None, None, None


_SECOND = (
    "fused attention has no second derivatives, eager attention has them: give eager=True, set GENKIT_KERNELS=off, or "
    "keep both the forward and every backward of it within genkit.kernels.choose('off')"
)


class _Once(_Unbatched):
    """A backward pass, which cannot be differentiated again."""

    @staticmethod
    def forward(backward: Callable, *arguments):
        return backward(*arguments)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_) -> Any:
        raise RuntimeError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *_) -> Any:
        raise RuntimeError(_SECOND)
