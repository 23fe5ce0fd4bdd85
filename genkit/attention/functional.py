"""``attention`` and ``attention_with_tangent``: checked, then eager or fused."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from genkit import kernels
from genkit.attention import autograd, compiled, reference
from genkit.attention.inputs import Inputs, check, check_tangents

# Modules of genkit load when something of them is asked for, which had better not be within torch.compile.
_EAGER, _FUSED, _COMPILED = (
    (module.attention, module.attention_with_tangent) for module in (reference, autograd, compiled)
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    eager: bool = False,
) -> Tensor:
    """Attention ``o = softmax(scale q k^T + bias) v`` with forward mode, and gradients of value and tangent.

    It goes through ``torch.func.jvp``, ``torch.autograd.forward_ad``, ``backward`` and the gradient of a jvp. On NVIDIA
    GPUs from Ampere on it is fused, in float16, bfloat16 and float32, with memory linear in tokens, and has first
    derivatives only, of value and tangent; second ones raise. Elsewhere, in float64, and with ``GENKIT_KERNELS=off`` it
    is plain PyTorch, which has derivatives of any order. A row of which every key is masked is 0.

    Args:
        q: ``(B, H, M, D)``; on GPUs ``D`` is a multiple of 8 from 16 to 256.
        k: ``(B, Hk, N, D)``, of which ``H`` is a multiple: each head of k serves ``H / Hk`` neighbouring heads of q.
        v: ``(B, Hk, N, Dv)``.
        mask: boolean, True where attended, broadcast to ``(B, H, M, N)``; ``(B, N)`` masks keys.
        bias: added to scores, in q's dtype, broadcast likewise; may require gradients and carry a tangent.
        is_causal: query i attends to keys up to i, where ``M = N``.
        scale: of scores, by default ``D ** -0.5``.
        eager: plain PyTorch, whatever ``GENKIT_KERNELS`` says.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with what is accepted.
        RuntimeError: a second derivative of fused attention, or ``torch.vmap`` over it, as in ``jacfwd``.
    """
    tensors = (q, k, v, mask, bias)
    if has_torch_function(tensors):
        return handle_torch_function(
            attention, tensors, q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale, eager=eager
        )
    inputs = check(q, k, v, mask, bias, is_causal, scale)
    return _ways(inputs, eager)[0](inputs)


def attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    tbias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    eager: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` and its derivative along ``(tq, tk, tv, tbias)``, as one operation.

    ``o = p v`` and ``to = (p * (t - mu)) v + p tv``, where ``t = scale (tq k^T + q tk^T) + tbias`` and ``mu`` is the
    mean of ``t`` under ``p``, row by row. Tangents that are ``None`` are 0 and cost nothing. Both outputs have
    gradients to all inputs, and no forward mode where it is fused. This is for networks that carry values and tangents
    side by side, and for ``torch.compile``, which loses what goes through forward mode.

    Args and errors are those of :func:`attention`; ``tq``, ``tk``, ``tv`` have the shapes of ``q``, ``k``, ``v``.

    Source: the recurrence of Lu & Song, "Simplifying, stabilizing and scaling continuous-time consistency models",
    arXiv 2410.11081, appendix F; gradients and centring are derived here.
    """
    inputs = check(q, k, v, mask, bias, is_causal, scale)
    tangents = check_tangents(inputs, tq, tk, tv, tbias)
    return _ways(inputs, eager)[1](inputs, *tangents)


def fits(*tensors: Tensor) -> bool:
    """Whether there is a kernel for as many channels a head."""
    return all(x.shape[-1] % 8 == 0 and 16 <= x.shape[-1] <= 256 for x in tensors)


def _ways(inputs: Inputs, eager: bool) -> tuple[Callable, Callable]:
    if eager or not _fused(inputs):
        return _EAGER
    return _COMPILED if torch.compiler.is_compiling() else _FUSED


# Bytes of nine tiles of 16 rows and 256 channels in float32, which a gradient of the tangent holds at once.
_WIDE = 9 * 16 * 256 * 4


def _fused(inputs: Inputs) -> bool:
    if inputs.q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not kernels.fused(inputs.q.device):
        return False
    for name, x in (("q and k", inputs.q), ("v", inputs.v)):
        if not fits(x):
            raise ValueError(
                f"{name} have {x.shape[-1]} channels a head; fused attention takes multiples of 8 from 16 to 256: pad "
                "with zeros and give scale, or take eager attention by eager=True or GENKIT_KERNELS=off"
            )
    widest, shared = max(inputs.q.shape[-1], inputs.v.shape[-1]), kernels.shared_memory(inputs.q.device)
    if inputs.q.dtype == torch.float32 and widest > 160 and shared < _WIDE:
        reason = (
            f"{widest} channels a head in float32 need {_WIDE // 1024} KiB of shared memory, and {inputs.q.device} has "
            f"{shared // 1024}; take float16 or bfloat16, or at most 160 channels"
        )
        if kernels.mode() == "on":
            raise RuntimeError(f"GENKIT_KERNELS=on: {reason}; or take eager attention by eager=True")
        kernels.say_eager(reason)
        return False
    return True
