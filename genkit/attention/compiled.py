"""Fused attention within ``torch.compile``: opaque operators, of which it knows shapes and gradients.

It looks into an autograd function, and loses the forward-mode rule there without an error; nor do operators have such
rules. So forward mode that reaches one raises here, and tangents go in and out of :func:`attention_with_tangent` as
tensors among others.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from genkit.attention import autograd
from genkit.attention.inputs import Inputs, Options


def attention(inputs: Inputs) -> Tensor:
    """``o``, where forward mode is off.

    Raises:
        RuntimeError: within ``torch.func.jvp`` or a dual level, with what to do.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        # Up to torch 2.11 what cannot be compiled runs as it is, and what chose this way within it was compiled.
        return torch.compiler.disable(autograd.attention)(inputs)
    _refuse_forward_mode()
    q, k, v, mask, bias, options = inputs
    return _forward(q, k, v, bias, mask, options.scale, options.is_causal)[0]


def attention_with_tangent(
    inputs: Inputs, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(o, to)``; raises as :func:`attention` does."""
    _refuse_forward_mode()
    q, k, v, mask, bias, options = inputs
    tangents, precise = (tq, tk, tv, tbias), torch.is_grad_enabled()
    return _pair(q, k, v, bias, mask, *tangents, options.scale, options.is_causal, precise)[:2]


def _refuse_forward_mode() -> None:
    if forward_ad._current_level >= 0:  # torch.func.jvp enters a level, too
        raise RuntimeError(
            "fused attention has no forward mode within torch.compile; compile without fullgraph=True, so that it runs "
            "as it is, call genkit.attention.attention_with_tangent in a network that carries its tangents itself, or "
            "take eager attention by GENKIT_KERNELS=off"
        )


# Operators return neither None nor tensors of an unknown layout: nothing is an empty tensor, rows are (B, M, H, D) in
# memory, as the kernels lay them.


def _row(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)


def _flat(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x.contiguous()


def _empty_rows(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    b, h, m, _ = like.shape
    return like.new_empty(b, m, h, channels, dtype=dtype).transpose(1, 2)


@custom_op("genkit::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    _refuse_forward_mode()  # of what was exported
    o, lse = autograd._triton().forward(q, k, v, bias, mask, Options(scale, is_causal))
    return _row(o, q), _flat(lse, q)


@_forward.register_fake
def _(q, k, v, bias, mask, scale, is_causal):
    return _empty_rows(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@custom_op("genkit::attention_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    g: Tensor,
    scale: float,
    is_causal: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (q, k, v, bias, mask, o, lse, g, Options(scale, is_causal), tuple(needs))
    dq, dk, dv, dbias = autograd._triton().backward(*arguments)
    return _row(dq, q), _row(dk, q), _row(dv, q), _flat(dbias, q)


@_backward.register_fake
def _(q, k, v, bias, mask, o, lse, g, scale, is_causal, needs):
    return *_empty_gradients((q, k, v), needs, q), q.new_empty(bias.shape if needs[3] else 0)


def _empty_gradients(tensors, needs, like: Tensor) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=False)
    return [_empty_rows(x, x.shape[-1]) if needed else like.new_empty(0) for x, needed in pairs]


def _run(name: str, *arguments) -> tuple[Tensor | None, ...]:
    """What the kernels' function of this name returns, by its operator: gradients that are not needed are ``None``."""
    *tensors, options, needs = arguments
    operator = {"backward": _backward, "backward_with_tangent": _pair_backward}[name]
    made = operator(*tensors, options.scale, options.is_causal, list(needs))
    return tuple(x if needed else None for x, needed in zip(made, needs, strict=True))


def _save_forward(ctx, inputs, output) -> None:
    q, k, v, bias, mask, *options = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(q, k, v, bias, mask, *output)


def _forward_gradient(ctx, g, _):
    grads = _run("backward", *ctx.saved_tensors, g, ctx.options, ctx.needs_input_grad[:4])
    return *grads, None, None, None


_forward.register_autograd(_forward_gradient, setup_context=_save_forward)


@custom_op("genkit::attention_with_tangent", mutates_args=())
def _pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    scale: float,
    is_causal: bool,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_forward_mode()
    arguments = (q, k, v, bias, mask, tq, tk, tv, tbias, Options(scale, is_causal), precise)
    o, to, lse, mu, exact, exact_tangent = autograd._triton().forward_with_tangent(*arguments)
    return _row(o, q), _row(to, q), _flat(lse, q), _flat(mu, q), _row(exact, q), _row(exact_tangent, q)


@_pair.register_fake
def _(q, k, v, bias, mask, tq, tk, tv, tbias, scale, is_causal, precise):
    o, to = (_empty_rows(q, v.shape[-1]) for _ in range(2))
    lse, mu = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    if not precise or q.dtype == torch.float32:
        return o, to, lse, mu, q.new_empty(0), q.new_empty(0)
    return o, to, lse, mu, *(_empty_rows(q, v.shape[-1], torch.float32) for _ in range(2))


@custom_op("genkit::attention_with_tangent_backward", mutates_args=())
def _pair_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    tbias: Tensor | None,
    o: Tensor,
    to: Tensor,
    lse: Tensor,
    mu: Tensor,
    g: Tensor | None,
    h: Tensor,
    scale: float,
    is_causal: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(scale, is_causal)
    arguments = (q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, options, tuple(needs))
    dq, dk, dv, dbias, dtq, dtk, dtv, dtbias = autograd._triton().backward_with_tangent(*arguments)
    rows = [_row(x, q) for x in (dq, dk, dv, dtq, dtk, dtv)]
    return *rows[:3], _flat(dbias, q), *rows[3:], _flat(dtbias, q)  # type: ignore[return-value]


@_pair_backward.register_fake
def _(q, k, v, bias, mask, tq, tk, tv, tbias, o, to, lse, mu, g, h, scale, is_causal, needs):
    rows = [_empty_gradients(tensors, some, q) for tensors, some in (((q, k, v), needs), ((tq, tk, tv), needs[4:]))]
    dbias, dtbias = (q.new_empty(bias.shape if needed else 0) for needed in (needs[3], needs[7]))
    return *rows[0], dbias, *rows[1], dtbias


def _save_pair(ctx, inputs, output) -> None:
    *tensors, scale, is_causal, _ = inputs
    o, to, lse, mu, exact, exact_tangent = output
    ctx.options = Options(scale, is_causal)
    ctx.set_materialize_grads(False)
    if exact.numel():
        o, to = exact, exact_tangent
    ctx.save_for_backward(*tensors, o, to, lse, mu)


def _pair_gradient(ctx, g, h, *_):
    return autograd.pair_gradients(ctx, g, h, _run)


_pair.register_autograd(_pair_gradient, setup_context=_save_pair)
