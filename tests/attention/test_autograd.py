"""What PyTorch is told of fused attention, around the kernels' formulas, against its own derivatives of eager code."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from genkit.attention import autograd, reference
from genkit.attention.inputs import Inputs, check
from tests.attention import closed_form

F64 = torch.float64
B, H, M, N, D, DV = 2, 4, 5, 7, 6, 3

CASES = {
    "plain": dict(),
    "grouped": dict(groups=2),
    "one head of keys": dict(groups=1),
    "mask with empty rows": dict(mask=True),
    "mask of keys": dict(mask="keys"),
    "causal": dict(causal=True),
    "bias": dict(bias=(1, H, M, N)),
    "bias broadcast": dict(bias=(B, 1, 1, N)),
    "scale": dict(scale=-0.7),
    "everything": dict(groups=2, mask=True, bias=(1, H, 1, N), causal=True, scale=0.3),
}


class Case:
    """Inputs, tangents and weights of a loss; ``fields`` are in the order of ``q, k, v, bias``."""

    def __init__(self, groups=H, mask=None, causal=False, bias=None, scale=None):
        n = M if causal else N
        shape = None if bias is None else tuple(n if size == N else size for size in bias)
        shapes = [(B, H, M, D), (B, groups, n, D), (B, groups, n, DV), *([shape] if shape else [])]
        self.x, self.tangents = ([torch.randn(s, dtype=F64) for s in shapes] for _ in range(2))
        self.g, self.h = (torch.randn(B, H, M, DV, dtype=F64) for _ in range(2))
        self.mask = None
        if mask is not None:
            self.mask = torch.rand(B, 1, 1 if mask == "keys" else M, n) > 0.4
            self.mask[0, 0, -1] = mask == "keys"
        self.causal, self.scale = causal, scale

    def inputs(self, x: list[Tensor]) -> Inputs:
        return check(*x[:3], self.mask, x[3] if len(x) > 3 else None, self.causal, self.scale)

    def loss(self, o, to, uses):
        return sum((weight * y).sum() for name, weight, y in (("g", self.g, o), ("h", self.h, to)) if name in uses)


def leaves(tensors):
    return [x.clone().requires_grad_() for x in tensors]


def by_jvp(case, fn, x, tangents):
    return torch.func.jvp(lambda *x: fn(case.inputs(list(x))), tuple(x), tuple(tangents))


def by_dual_level(case, fn, x, tangents):
    with forward_ad.dual_level():
        duals = [a if t is None else forward_ad.make_dual(a, t) for a, t in zip(x, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(fn(case.inputs(duals))))


def by_pair(case, fn, x, tangents):
    return fn(case.inputs(x), *tangents, *(None,) * (4 - len(tangents)))


def fused(inputs):
    return autograd.attention(inputs, closed_form)


def fused_pair(inputs, *tangents):
    return autograd.attention_with_tangent(inputs, *tangents, closed_form)


def same(made, expected):
    """Up to 1e-13 of the norm; absent is zero."""
    for a, b in zip(made, expected, strict=True):
        a, b = (torch.zeros((), dtype=F64) if x is None else x for x in (a, b))
        assert (a - b).norm() <= 1e-13 * b.norm().clamp(min=1)


def differentiate(case, way, fn, uses, given=None):
    """``(o, to)`` and the gradients of the loss to all inputs and tangents."""
    x, tangents = leaves(case.x), leaves(case.tangents)
    some = tangents if given is None else [t if i in given else None for i, t in enumerate(tangents)]
    o, to = way(case, fn, x, some)
    gradients = torch.autograd.grad(case.loss(o, to, uses), [*x, *tangents], allow_unused=True)
    return o, to, *gradients


@pytest.mark.parametrize("uses", ["gh", "g", "h"])
@pytest.mark.parametrize("name", CASES)
def test_values_tangents_and_all_gradients(name, uses):
    case = Case(**CASES[name])
    expected = differentiate(case, by_pair, reference.attention_with_tangent, uses)
    for way, fn in ((by_jvp, fused), (by_pair, fused_pair), (by_jvp, reference.attention)):
        same(differentiate(case, way, fn, uses), expected)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (1, 2)])
def test_tangents_that_are_absent_are_zero_and_get_no_gradient(given):
    case = Case(**CASES["everything"])
    expected = differentiate(case, by_pair, reference.attention_with_tangent, "gh", given)
    absent = [i not in given for i in range(4)]
    assert [x is None for x in expected[-4:]] == absent
    for way, fn in ((by_dual_level, fused), (by_pair, fused_pair), (by_dual_level, reference.attention)):
        made = differentiate(case, way, fn, "gh", given)
        same(made, expected)
        assert [x is None for x in made[-4:]] == absent


@pytest.mark.parametrize("given", range(1, 8))
def test_tangents_that_are_absent_are_none_to_kernels(given):
    """So that these skip loads and products; ``torch.func.jvp`` and dual levels make no zeros of them either."""
    asked = []

    class Asked:
        forward = closed_form.forward

        @staticmethod
        def tangent(*arguments):
            asked.append([x is not None for x in arguments[6:9]])
            return closed_form.tangent(*arguments)

    case, some = Case(), [bool(given >> i & 1) for i in range(3)]

    def attend(*moving):
        moving = iter(moving)
        x = [next(moving) if moves else x for x, moves in zip(case.x, some, strict=True)]
        return autograd.attention(case.inputs(x), Asked)

    def chosen(x):
        return tuple(y for y, moves in zip(x, some, strict=True) if moves)

    torch.func.jvp(attend, chosen(case.x), chosen(case.tangents))
    with forward_ad.dual_level():
        attend(*map(forward_ad.make_dual, chosen(case.x), chosen(case.tangents)))
    assert asked == [some, some]


def test_an_unused_output_asks_for_no_kernel():
    """The tangent's backward costs thrice the value's, so it had better not run on zeros."""
    called = []

    class Counted:
        def __getattr__(self, name):
            called.append(name)
            return getattr(closed_form, name)

    case = Case()
    for way, fn in ((by_jvp, autograd.attention), (by_pair, autograd.attention_with_tangent)):
        for uses, expected in (("g", ["backward"]), ("h", ["backward_with_tangent"])):
            x = leaves(case.x)
            o, to = way(case, lambda *a, fn=fn: fn(*a, Counted()), x, case.tangents)
            called.clear()
            torch.autograd.grad(case.loss(o, to, uses), x)
            assert called == expected


def test_a_detached_tangent_leaves_the_ordinary_backward():
    case = Case()
    x = leaves(case.x)
    o, to = by_jvp(case, fused, x, case.tangents)
    gradients = torch.autograd.grad((o * case.g + to.detach() * case.h).sum(), x)
    plain = leaves(case.x)
    same(gradients, torch.autograd.grad((fused(case.inputs(plain)) * case.g).sum(), plain))


def test_only_what_needs_gradients_gets_them():
    case = Case(bias=(1, H, 1, N))
    q, k, v, bias = case.x
    q.requires_grad_()
    o, to = by_pair(case, fused_pair, [q, k, v, bias], case.tangents)
    case.loss(o, to, "gh").backward()
    assert q.grad.abs().max() > 0 and all(x.grad is None for x in (k, v, bias, *case.tangents))


def test_float32_copies_are_asked_for_where_gradients_are_recorded():
    asked = []

    class Asked:
        forward, backward = closed_form.forward, closed_form.backward

        @staticmethod
        def tangent(*arguments):
            asked.append(arguments[-1])
            return closed_form.tangent(*arguments)

        @staticmethod
        def forward_with_tangent(*arguments):
            asked.append(arguments[-1])
            return closed_form.forward_with_tangent(*arguments)

    case = Case()
    for way, fn in ((by_jvp, autograd.attention), (by_pair, autograd.attention_with_tangent)):
        for recording in (False, True):
            with torch.set_grad_enabled(recording):
                way(case, lambda *a, fn=fn: fn(*a, Asked), case.x, case.tangents)
    assert asked == [False, True, False, True]


def test_duality():
    """``<h, to(tx)> = <J^T h, tx>``: the backward, of which the forward-mode rule knows nothing, agrees with it."""
    case = Case(**CASES["everything"])
    x = leaves(case.x)
    o, to = by_jvp(case, fused, x, case.tangents)
    pulled = torch.autograd.grad((o * case.h).sum(), x)
    inner = sum((g * t).sum() for g, t in zip(pulled, case.tangents, strict=True))
    torch.testing.assert_close(inner, (to * case.h).sum(), rtol=1e-12, atol=1e-12)
