"""Gradients by the kernels, interpreted where there is no GPU, against float64 on the very inputs they get."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from genkit.attention import _triton_backward as kernels
from genkit.attention import reference
from genkit.attention._tiles import Tile
from genkit.attention.inputs import Options, check
from tests.attention import closed_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
SMALL = kernels.Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
NAMES = ("q", "k", "v", "bias", "tq", "tk", "tv", "tbias")


@dataclass(frozen=True)
class Problem:
    """What the kernels are given; ``o``, ``to``, ``lse`` and ``mu`` are exact."""

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    g: Tensor | None
    h: Tensor | None
    options: Options
    mask: Tensor | None = None
    bias: Tensor | None = None
    tbias: Tensor | None = None

    def exact(self, dtype=torch.float32):
        """``o, to, lse, mu``, of which the first two are rounded to ``dtype``."""
        q, k, v, tq, tk, tv, bias, tbias = map(
            double, (self.q, self.k, self.v, self.tq, self.tk, self.tv, self.bias, self.tbias)
        )
        mask = None if self.mask is None else self.mask.cpu()
        o, to, lse, mu, _, _ = closed_form.forward_with_tangent(
            q, k, v, bias, mask, tq, tk, tv, tbias, self.options, False
        )
        return o.to(DEVICE, dtype), to.to(DEVICE, dtype), lse.to(DEVICE, torch.float32), mu.to(DEVICE, torch.float32)

    def by_kernels(self, dtype=torch.float32, tiles=SMALL) -> tuple[Tensor | None, ...]:
        """Gradients in the order of NAMES; without ``h`` by the ordinary backward."""
        o, to, lse, mu = self.exact(dtype)
        if self.h is None:
            inputs = (self.q, self.k, self.v, self.bias, self.mask, o, lse, self.g, self.options)
            return (*kernels.backward(*inputs, self.bias is not None, tiles), None, None, None, None)
        needs = (self.bias is not None, self.tbias is not None)
        inputs = (self.q, self.k, self.v, self.bias, self.mask, self.tq, self.tk, self.tv, self.tbias)
        return kernels.backward_with_tangent(*inputs, o, to, lse, mu, self.g, self.h, self.options, needs, tiles)

    def by_autograd(self) -> tuple[Tensor | None, ...]:
        """The same through eager attention in float64."""
        leaves = [double(getattr(self, name)) for name in NAMES]
        leaves = [None if x is None else x.requires_grad_() for x in leaves]
        q, k, v, bias, *tangents = leaves
        inputs = check(
            q, k, v, None if self.mask is None else self.mask.cpu(), bias, self.options.is_causal, self.options.scale
        )
        o, to = reference.attention_with_tangent(inputs, *tangents)
        loss = sum((x * double(up)).sum() for x, up in ((o, self.g), (to, self.h)) if up is not None)
        there = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(loss, there, allow_unused=True, materialize_grads=True))
        grads = [None if x is None else next(grads) for x in leaves]
        return tuple(grads if self.h is not None else grads[:4] + [None] * 4)


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().cpu().double()


def problem(dtype, b, h, hk, m, n, d, dv, hard=False, causal=False, tangents=(True, True, True), g=True, to=True):
    """Hard: tangents of keys have a common part of size 4 a channel, values an offset."""
    q, k, v, tq, tk, tv = (torch.randn(s) for s in ((b, h, m, d), (b, hk, n, d), (b, hk, n, dv)) * 2)
    if hard:
        tk, v = tk + 4 * torch.randn(d), v + 4 * torch.randn(dv)
    up = [torch.randn(b, h, m, dv), torch.randn(b, h, m, dv)]
    q, k, v, tq, tk, tv, *up = (x.to(dtype).to(DEVICE) for x in (q, k, v, tq, tk, tv, *up))
    tq, tk, tv = (x if there else None for x, there in zip((tq, tk, tv), tangents, strict=True))
    up = [x if there else None for x, there in zip(up, (g, to), strict=True)]
    return Problem(q, k, v, tq, tk, tv, *up, Options(d**-0.5, causal))


def errors(got, want) -> dict[str, float]:
    """Relative ones, by name; both have the same gradients, in the same shapes."""
    found = {}
    for name, x, wanted in zip(NAMES, got, want, strict=True):
        assert (x is None) == (wanted is None), name
        if x is not None:
            assert x.shape == wanted.shape, name
            assert x.isfinite().all(), name
            found[name] = ((x.cpu().double() - wanted).norm() / wanted.norm()).item()
    return found


def agree(given: Problem, tolerance: float | None = None, tiles=SMALL):
    found = errors(given.by_kernels(tiles=tiles), given.by_autograd())
    limit = tolerance or TOLERANCE[given.q.dtype]
    assert max(found.values()) <= limit, found
    return found


# b, h, heads of k, m, n, d, dv: ragged both ways, channels that are split or padded, queries that share keys
SHAPES = [
    (1, 2, 2, 33, 40, 72, 40),
    (1, 4, 2, 20, 35, 16, 72),
    (2, 1, 1, 40, 33, 40, 16),
    (1, 1, 1, 20, 20, 128, 24),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_gradients_are_those_of_float64(shape, dtype):
    agree(problem(dtype, *shape))
    agree(problem(dtype, *shape, to=False))
