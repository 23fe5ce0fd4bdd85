"""What CFG and APG do with two predictions, as pure functions of tensors and scalars.

A step of guidance is three (CFG) to fifty (APG) small operations beside a network of 50 to 500 ms: 0.25 ms of launches.
``GENKIT_KERNELS=on`` compiles each function to one or two kernels; otherwise they are eager, also on GPUs, since
compiling takes some seconds, of which a run's steps save a hundredth. The results are the same to rounding.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps

import torch
from torch import Tensor

from genkit.kernels import mode

_TERMS = 256


def compilable(function: Callable) -> Callable:
    """``function(*tensors and scalars, **settings)``; compiled where kernels are demanded.

    Scalars go in as tensors, so that another guidance scale or another time is no other program.
    """

    @cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def run(*values, **settings):
        if mode() != "on":
            return function(*values, **settings)
        device = values[0].device
        tensors = (_scalar(v, i, device) if isinstance(v, int | float) else v for i, v in enumerate(values))
        return compiled()(*tensors, **settings)

    return run


@lru_cache(maxsize=256)
def _scalar(value: float, position: int, device: torch.device) -> Tensor:
    """Shape ``()``, in float64 where there is one, which widens nothing; no two arguments are one."""
    with torch.inference_mode(False):  # it is kept for runs that may differentiate
        return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


@compilable
def cfg(cond: Tensor, uncond: Tensor, scale: float, rescale: float | None) -> Tensor:
    """``g = u + w (c - u)``, and ``g + phi (g std(c) / std(g) - g)`` if there is a ``rescale``."""
    guided = (cond - uncond).mul_(scale).add_(uncond)  # in place: as fast as memory allows
    if rescale is not None:
        factor = _std(cond) / _std(guided)
        guided = guided + rescale * (guided * (factor - 1)).to(guided.dtype)
    return guided


@compilable
def apg(
    cond: Tensor,
    uncond: Tensor,
    reference: Tensor,
    factor: Tensor | None,
    before: Tensor | None,
    threshold: float | None,
    orthogonal: float,
    parallel: float,
    *,
    momentum: float,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The update ``orthogonal q + parallel par``, the push ``m`` and, over ``dims``, ``|m|``, its cosine, and the cap.

    With ``D`` the ``reference``: ``m = factor (c - u) + beta before``, ``q = m min(1, threshold / |m|)``,
    ``par = <q, D> / <D, D> D``.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    push = cond.to(wide) - uncond.to(wide)
    if factor is not None:
        push.mul_(factor)
    if before is not None:
        push = torch.add(push, before, alpha=momentum)
    norm, length = dot(push, push, dims).sqrt(), dot(reference, reference, dims)
    along = dot(push, reference, dims) / length.where(length > 0, 1)
    cap = torch.ones_like(norm) if threshold is None else (threshold / norm).clamp(max=1)
    cosine = along * length.sqrt() / norm.where(norm > 0, 1)
    update = (push * (orthogonal * cap).to(push.dtype)).addcmul_(reference, (parallel * cap * along).to(push.dtype))
    return update, push, norm, cosine, cap


def dot(x: Tensor, y: Tensor, dims: Sequence[int]) -> Tensor:
    """``<x, y>`` over ``dims``, which stay as axes of size 1; in float64 beyond 256 terms, fast."""
    kept = [d for d in range(x.ndim) if d not in {a % x.ndim for a in dims}]
    shape = [n if d in kept else 1 for d, n in enumerate(x.shape)]
    if kept != [0] or x[0].numel() % _TERMS:
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        return (x * y).sum(list(dims), keepdim=True, dtype=wide)
    x, y = (v.reshape(len(v), -1, _TERMS) for v in (x, y))
    total = torch.linalg.vecdot(x, y)
    return total.to(total.dtype if x.device.type == "mps" else torch.float64).sum(1).view(shape)


def _std(x: Tensor) -> Tensor:
    x = x.double() if x.dtype.itemsize > 4 else x.float()
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
