"""What networks call for attention, ``torch.nn.functional.scaled_dot_product_attention``, by ours."""

import torch
from torch import Tensor

from genkit import kernels
from genkit.attention.functional import attention, fits


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function of this name by :func:`genkit.attention.attention`, hence with tangents.

    Shapes and masks are PyTorch's: ``(..., L, E)``, boolean masks are True where attended, others are added to scores,
    two axes are ``(queries, keys)``, axes of batch broadcast, and ``is_causal`` starts in the upper left corner. Any
    ``E``: heads that are too wide or too narrow for the fused kernel are computed eagerly, unless ``GENKIT_KERNELS=on``
    demands it. A row of which every key is masked is 0, as there.

    Raises:
        ValueError: dropout, heads of ``key`` that are fewer without ``enable_gqa``, or batches that do not broadcast.
    """
    if dropout_p > 0:
        raise ValueError(
            f"dropout_p={dropout_p:g}: attention that carries tangents has no dropout; put the network into eval mode, "
            "or set the dropout of its attention to 0"
        )
    query, key, value = _one_batch(query, key, value)
    axes, (m, n) = query.ndim, (query.shape[-2], key.shape[-2])
    if axes > 3 and not enable_gqa and key.shape[-3] not in (1, query.shape[-3]):
        raise ValueError(
            f"query has {query.shape[-3]} heads and key {key.shape[-3]}; expected as many, or enable_gqa=True"
        )
    mask = bias = None
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (axes - attn_mask.ndim)]
        if axes > 4:
            attn_mask = attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:])
        attn_mask = _four_axes(attn_mask)
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask.to(query.dtype))
    if is_causal and m != n:
        corner = torch.ones(m, n, dtype=torch.bool, device=query.device).tril()[None, None]
        mask, is_causal = corner if mask is None else mask & corner, False
    eager = kernels.mode() == "auto" and not fits(query, value)
    q, k, v = (_four_axes(x) for x in (query, key, value))
    o = attention(q, k, v, mask, bias, is_causal, scale, eager)
    return o if axes == 4 else o.reshape(*query.shape[:-1], value.shape[-1])


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading axes broadcast, as matrix products do; heads, the third axis from the end, only where k and v differ."""
    axes = max(x.ndim for x in (query, key, value))
    query, key, value = (x if x.ndim == axes else x[(None,) * (axes - x.ndim)] for x in (query, key, value))
    kept = 3 if axes > 3 and key.shape[-3] == value.shape[-3] else 2
    shapes = [tuple(x.shape[:-kept]) for x in (query, key, value)]
    if len(set(shapes)) == 1:
        return query, key, value
    try:
        common = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"query, key and value have leading axes {shapes[0]}, {shapes[1]} and {shapes[2]}; expected axes that "
            "broadcast"
        ) from None
    query, key, value = (x.expand(*common, *x.shape[-kept:]) for x in (query, key, value))
    return query, key, value


def _four_axes(x: Tensor) -> Tensor:
    if x.ndim > 4:
        return x.flatten(0, x.ndim - 4)
    return x.unsqueeze(1) if x.ndim == 3 else x[(None,) * (4 - x.ndim)]
