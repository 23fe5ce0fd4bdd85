"""Whether a backend computes attention, its tangents and gradients on a device: tried once, on tensors of a few kB."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genkit import kernels
from genkit._diffusers import backend_function, backend_names
from genkit.attention import conventions, reference
from genkit.attention.inputs import check
from genkit.attention.sdpa import scaled_dot_product_attention
from genkit.registry import unknown

OURS = "genkit"
_TOKENS = 64
# Of what is right, in norm. Half precision and 8-bit kernels are far below; a tangent that is lost or zero is not.
_TOLERANCE = 0.1


def names() -> list[str]:
    """Backends by name: Diffusers' and ours."""
    return sorted({*backend_names(), OURS})


@cache
def compute(name: str) -> Callable[..., Tensor]:
    """Attention by the backend ``name``, called as PyTorch's own.

    Raises:
        ValueError: there is no such backend, or its package is missing.
    """
    if name not in names():
        raise ValueError(unknown("backend", name, ["auto", *names()]))
    if name == OURS:
        return scaled_dot_product_attention
    try:
        _, function, takes = backend_function(name)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"backend={name!r}: {error}") from error
    return F.scaled_dot_product_attention if name == "native" else conventions.from_diffusers(name, function, takes)


def problem(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    *,
    tangent: bool = False,
    gradient: bool = False,
    masked: bool = False,
) -> str | None:
    """Why a backend does not compute self-attention here; ``None`` where it does, and right.

    Args:
        tangent: also under ``torch.func.jvp``.
        gradient: also backwards.
        masked: with keys that are masked.

    Raises:
        ValueError: there is no such backend, or its package is missing.
    """
    attend = compute(name)
    return _problem(attend, kernels.mode(), torch.device(device), dtype, head_size, tangent, gradient, masked)


@cache
def _problem(attend, mode, device, dtype, head_size, tangent, gradient, masked) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 2, _TOKENS, head_size, generator=generator).to(device, dtype)
    mask = torch.arange(_TOKENS, device=device).expand(1, 1, _TOKENS, -1) < _TOKENS // 2 if masked else None
    try:
        with torch.enable_grad() if gradient else torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = _results(lambda q, k, v: attend(q, k, v, attn_mask=mask), x, tangent, gradient)
    except conventions.LostTangent:
        return "it loses tangents"
    except Exception as error:  # kernels raise whatever they like
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"no forward mode ({text})" if tangent and "forward AD" in str(error) else text
    with torch.enable_grad() if gradient else torch.no_grad():
        exact = _results(
            lambda q, k, v: reference.attention(
                check(q, k, v, mask if mask is None else mask.cpu(), None, False, None)
            ),
            x.cpu().double(),
            tangent,
            gradient,
        )
    for (what, got), (_, right) in zip(found, exact, strict=True):
        if not (got.cpu().double() - right).norm() <= _TOLERANCE * right.norm():
            return f"its {what} is wrong"
    return None


def _results(attend: Callable, x: Tensor, tangent: bool, gradient: bool) -> list[tuple[str, Tensor]]:
    primals = tuple(part.clone().requires_grad_(gradient) for part in x[:3])
    if tangent:
        o, to, *_ = torch.func.jvp(attend, primals, tuple(x[3:]))
        results = [("result", o), ("tangent", to)]
        total = (o * x[3]).sum() + (to * x[4]).sum()
    else:
        o = attend(*primals)
        results, total = [("result", o)], (o * x[3]).sum()
    if gradient:
        grads = torch.autograd.grad(total, primals, allow_unused=True)
        results += [("gradient", x.new_full((), torch.nan) if grad is None else grad) for grad in grads]
    return [(what, part.detach()) for what, part in results]


def head_size(module: nn.Module) -> tuple[int, bool]:
    """Channels a head of an attention module has, by its attributes, and whether they say so: else 64 is assumed."""
    for name in ("head_dim", "dim_head", "attention_head_dim", "key_value_proj_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size, True
    heads = next((n for name in ("heads", "num_heads", "num_attention_heads") if (n := getattr(module, name, 0))), 0)
    width = next((w for name in ("inner_dim", "embed_dim", "hidden_size") if (w := getattr(module, name, 0))), 0)
    for name, share in (("qkv", 3), ("to_qkv", 3), ("to_q", 1), ("q_proj", 1)):
        layer = getattr(module, name, None)
        width = width or getattr(layer, "out_features", 0) // share
    known = isinstance(heads, int) and isinstance(width, int) and bool(heads and width)
    return (width // heads, True) if known else (64, False)
