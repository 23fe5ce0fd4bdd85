"""``attention`` and ``attention_with_tangent`` as users call them: what they compute, and what they refuse."""

import logging
import math
import re

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from genkit import kernels
from genkit.attention import attention, attention_with_tangent, autograd
from tests.attention import closed_form
from tests.needs import kernels_that_run

F64 = torch.float64


def normal(*shape, dtype=F64):
    return torch.randn(shape, dtype=dtype)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draw(heads=2, groups=2, m=5, n=5, d=8, dv=8):
    return normal(2, heads, m, d), normal(2, groups, n, d), normal(2, groups, n, dv)


def like(tensors):
    return [torch.randn_like(x) for x in tensors]


# ---- values ----


@pytest.mark.parametrize(
    "settings, sizes",
    [
        ({}, {}),
        ({}, dict(m=3, n=9, dv=4)),
        (dict(scale=0.3), {}),
        (dict(scale=-1), {}),
        (dict(is_causal=True), {}),
        ({}, dict(heads=6, groups=3)),
        ({}, dict(heads=4, groups=1, is_causal=True)),
    ],
)
def test_values_are_those_of_pytorch(settings, sizes):
    sizes = dict(sizes)
    settings = settings | {key: sizes.pop(key) for key in ("is_causal",) if key in sizes}
    q, k, v = draw(**sizes)
    close(attention(q, k, v, **settings), F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **settings))


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 1, 3, 5), (1, 4, 1, 5), (4, 3, 5), (3, 5), (1, 1, 1, 1), (5,)])
def test_masks_and_biases_broadcast(shape):
    q, k, v = draw(4, 2, 3, 5)
    mask, bias = torch.rand(shape) > 0.3, normal(*shape)
    mask[..., 0] = True
    scores = torch.where(mask, bias, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, torch.atleast_2d(scores), enable_gqa=True)
    close(attention(q, k, v, mask, bias), expected)
    close(attention(q, k, v, bias=scores), expected)  # what is -inf is masked


def test_two_axes_of_batch_and_keys_mask_keys():
    q, k, v = draw(m=3)
    mask = torch.tensor([[True, True, False, False, True], [True, False, True, True, True]])
    expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    close(attention(q, k, v, mask), expected)
    close(attention(q, k, v, bias=torch.where(mask, 0.0, -math.inf).double()), expected)
    close(attention(q[:, :, :1], k, v, mask), expected[:, :, :1])
    bias, tbias = normal(2, 5), normal(2, 5)
    expected = attention_with_tangent(q, k, v, bias=bias[:, None, None], tbias=tbias[:, None, None])
    for a, b in zip(attention_with_tangent(q, k, v, bias=bias, tbias=tbias), expected, strict=True):
        close(a, b, 0)


def test_causality_and_a_mask_hold_together():
    q, k, v = draw()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(-1)
    close(attention(q, k, v, mask, is_causal=True), attention(q, k, v, mask.tril()))


def test_rows_without_keys_are_zero_with_zero_gradients():
    q, k, v = (x.requires_grad_() for x in draw())
    tangents = [x.requires_grad_() for x in like((q, k, v))]
    mask = torch.ones(2, 2, 5, 5, dtype=torch.bool)
    mask[:, :, 1] = mask[1] = False
    o, to = attention_with_tangent(q, k, v, *tangents, mask)
    by_mode = torch.func.jvp(lambda *x: attention(*x, mask), (q, k, v), tuple(tangents))
    for a, b in zip((o, to), by_mode, strict=True):
        close(a, b)
        assert (a[:, :, 1] == 0).all() and (a[1] == 0).all() and (a[0, :, 0] != 0).all()
    for outputs in ((o, to), by_mode):
        loss = sum(x.square().sum() + x.sum() for x in outputs)
        for gradient in torch.autograd.grad(loss, [q, k, v, *tangents]):
            assert gradient.isfinite().all() and (gradient[1] == 0).all() and gradient[0].abs().max() > 0


def test_half_precision_is_computed_in_float32():
    x = [normal(2, 2, 9, 16) for _ in range(6)]
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)):
        rounded = [y.to(dtype) for y in x]
        made = attention_with_tangent(*rounded)
        expected = attention_with_tangent(*(y.double() for y in rounded))
        for a, b in zip(made, expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() < tolerance / 4 * b.norm()  # that of the output's rounding alone
        assert attention(*rounded[:3]).dtype == dtype


def test_autocast_lowers_what_it_is_given():
    q, k, v = (x.float() for x in draw())
    tangents, bias = like((q, k, v)), torch.randn(5, 5)
    low = [x.bfloat16() for x in (q, k, v, *tangents)]
    with torch.autocast("cpu", torch.bfloat16):
        o = attention(q, k.bfloat16(), v, bias=bias)  # as after a norm in float32
        pair = attention_with_tangent(q, k, v, *tangents, bias=bias, tbias=bias)
        wide = attention(*(x.double() for x in (q, k, v)))
    assert o.dtype == pair[0].dtype == pair[1].dtype == torch.bfloat16 and wide.dtype == F64
    close(o, attention(*low[:3], bias=bias.bfloat16()), 0)
    for a, b in zip(pair, attention_with_tangent(*low, None, bias.bfloat16(), bias.bfloat16()), strict=True):
        close(a, b, 0)


def test_autocast_does_not_hide_what_is_no_floating_point():
    q, k, v = (x.float() for x in draw())
    with torch.autocast("cpu", torch.bfloat16):
        for name, args in (("q", (q.int(), k, v)), ("k", (q, k.int(), v)), ("v", (q, k, v.int()))):
            with pytest.raises(
                ValueError, match=f"{name} is torch.int32; expected float16, bfloat16, float32 or float64"
            ):
                attention(*args)
        with pytest.raises(
            ValueError, match="bias is torch.bool; expected float16, bfloat16, float32 or float64; a boolean one is a"
        ):
            attention(q, k, v, bias=torch.ones(5, 5) > 0)
        with pytest.raises(
            ValueError, match="the tangent of k is torch.int32; expected float16, bfloat16, float32 or float64"
        ):
            attention_with_tangent(q, k, v, tk=k.int())


def test_shapes_without_memory():
    q, k, v = (x.float().to("meta") for x in draw(dv=4))
    bias = torch.empty(5, 5, device="meta")
    for o in (attention(q, k, v, bias > 0, bias), *attention_with_tangent(q, k, v, q, k, v, bias=bias, tbias=bias)):
        assert o.is_meta and o.shape == (2, 2, 5, 4)
    with kernels.choose("on"), pytest.raises(RuntimeError, match="triton"):
        attention(q, k, v)


def test_eager_attention_by_argument():
    x = [torch.randn(1, 1, 4, 12) for _ in range(6)]
    expected = attention_with_tangent(*x)
    with kernels.choose("on"):
        close(attention(*x[:3], eager=True), expected[0], 0)
        for a, b in zip(attention_with_tangent(*x, eager=True), expected, strict=True):
            close(a, b, 0)


def test_what_overrides_functions_of_pytorch_overrides_it():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v = draw()
    with Mode():
        o = attention(q, k, v, scale=0.5)
    assert attention in seen
    close(o, attention(q, k, v, scale=0.5), 0)


# ---- tangents ----


def test_tangents_are_central_differences():
    q, k, v = draw(4, 2, 5, 7, 8, 4)
    bias = normal(1, 4, 5, 7)
    tangents, mask = like((q, k, v, bias)), torch.rand(2, 1, 5, 7) > 0.2
    x, h = (q, k, v, bias), 1e-5

    def at(step):
        q, k, v, bias = (a + step * t for a, t in zip(x, tangents, strict=True))
        return attention(q, k, v, mask, bias)

    difference = (at(h) - at(-h)) / (2 * h)
    _, by_mode = torch.func.jvp(lambda q, k, v, bias: attention(q, k, v, mask, bias), x, tuple(tangents))
    _, by_pair = attention_with_tangent(q, k, v, *tangents[:3], mask, bias, tangents[3])
    for to in (by_mode, by_pair):
        assert (to - difference).norm() <= 1.5e-10 * difference.norm()


def test_tangents_are_linear():
    x = draw()
    a, b = like(x), like(x)
    mixed = attention_with_tangent(*x, *(2 * s - 3 * t for s, t in zip(a, b, strict=True)))[1]
    close(mixed, 2 * attention_with_tangent(*x, *a)[1] - 3 * attention_with_tangent(*x, *b)[1])
    parts = [attention_with_tangent(*x, *(t if i == j else None for j, t in enumerate(a)))[1] for i in range(3)]
    close(sum(parts), attention_with_tangent(*x, *a)[1])


def test_a_common_vector_moves_no_tangent():
    """Added to all keys, to their tangents, or to all values."""
    q, k, v = draw()
    tq, tk, tv = like((q, k, v))
    common = normal(1, 1, 1, 8)
    expected = attention_with_tangent(q, k, v, tq, tk, tv)[1]
    close(attention_with_tangent(q, k + common, v, tq, tk, tv)[1], expected)
    close(attention_with_tangent(q, k, v, tq, tk + common, tv)[1], expected)
    close(attention_with_tangent(q, k, v + common, tq, tk, tv)[1], expected)


def test_known_tangents():
    q, k, v = draw()
    tq, tk, tv = like((q, k, v))
    zero = torch.zeros_like(q)
    uniform = attention_with_tangent(zero, k, v, zero, tk, tv)[1]
    close(uniform, tv.mean(2, keepdim=True).expand_as(uniform))
    single = attention_with_tangent(q, k[:, :, :1], v[:, :, :1], tq, tk[:, :, :1], tv[:, :, :1])[1]
    close(single, tv[:, :, :1].expand_as(single))
    o, to = attention_with_tangent(q, k, v)
    assert torch.equal(to, torch.zeros_like(o))
    close(o, attention(q, k, v))


def test_a_tangent_of_the_bias_broadcasts_to_it():
    q, k, v = draw(m=3)
    bias, tbias = normal(1, 2, 3, 5), normal(3, 1)
    _, expected = torch.func.jvp(lambda b: attention(q, k, v, bias=b), (bias,), (tbias.expand(1, 2, 3, 5).clone(),))
    close(attention_with_tangent(q, k, v, bias=bias, tbias=tbias)[1], expected)


# ---- bad input ----

q, k, v = torch.zeros(2, 4, 6, 16), torch.zeros(2, 2, 7, 16), torch.zeros(2, 2, 7, 24)
BAD = [
    ((q[0], k, v), {}, "q has shape (4, 6, 16); expected (batch, heads, tokens, channels)"),
    ((q, k.double(), v), {}, "q is torch.float32 and k is torch.float64; give both in one dtype"),
    ((q, k, v, None, torch.zeros(6, 7, dtype=F64)), {}, "and bias is torch.float64; give both in one dtype"),
    ((q, k, v.to("meta")), {}, "q is on cpu and v on meta; bring both to one device"),
    ((q.int(), k.int(), v.int()), {}, "q is torch.int32; expected float16, bfloat16, float32 or float64"),
    ((q.to(torch.float8_e4m3fn), k, v), {}, "q is torch.float8_e4m3fn; expected float16, bfloat16, float32 or"),
    ((q, k, v), dict(scale=torch.ones((), requires_grad=True)), "scale is a tensor whose derivatives would be lost"),
    ((q, k[:1], v), {}, "batches of 2, 1 and 2; expected one size"),
    ((q, k[..., :8], v), {}, "q has 16 channels a head and k 8; expected as many"),
    ((q, k, v[:, :, :3]), {}, "k has (heads, tokens) (2, 7) and v (2, 3); expected the same"),
    ((q[:, :3], k, v), {}, "q has 3 heads and k 2; expected a divisor of q's"),
    ((q, k[:, :, :0], v[:, :, :0]), {}, "k has no tokens; expected at least one"),
    ((q, k, v), dict(is_causal=True), "is_causal=True with 6 queries and 7 keys: libraries disagree"),
    ((q, k, v, torch.zeros(6, 7)), {}, "mask is torch.float32; expected torch.bool"),
    ((q, k, v, torch.ones(6, 5) > 0), {}, "(6, 5) does not broadcast to (batch, heads, queries, keys) = (2, 4, 6, 7)"),
    ((q, k, v, torch.ones(1, 2, 4, 6, 7) > 0), {}, "mask of shape (1, 2, 4, 6, 7) does not broadcast"),
    ((q, k, v, None, torch.zeros(3, 1, 1, 7)), {}, "bias of shape (3, 1, 1, 7) does not broadcast"),
    ((q[:, :, :2], k, v, torch.ones(2, 7) > 0), {}, "may be (queries, keys) or (batch, keys)"),
]


@pytest.mark.parametrize("args, settings, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(args, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(*args, **settings)
    names = ("q", "k", "v", "mask", "bias")
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_with_tangent(**dict(zip(names, args, strict=False)), **settings)


@pytest.mark.parametrize(
    "tangents, message",
    [
        (dict(tq=q[:1]), "q has shape (2, 4, 6, 16) and its tangent (1, 4, 6, 16); give one shape"),
        (dict(tk=k.double()), "k is torch.float32 and its tangent torch.float64; give both in one dtype"),
        (dict(tv=v.to("meta")), "v is on cpu and its tangent on meta; bring both to one device"),
        (dict(tbias=torch.zeros(6, 7)), "tbias was given without a bias; give a bias of zeros with it"),
        (dict(bias=torch.zeros(6, 7), tbias=torch.zeros(6, 6)), "tbias of shape (6, 6) does not broadcast"),
    ],
)
def test_bad_tangents(tangents, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_with_tangent(q, k, v, **tangents)


def test_a_scale_that_moves():
    with pytest.raises(
        ValueError, match="scale is a tensor whose derivatives would be lost; give a number, or multiply"
    ):
        torch.func.jvp(lambda scale: attention(q, k, v, scale=scale), (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(attention(q, k, v, scale=torch.tensor(0.5)), attention(q, k, v, scale=0.5))


@pytest.mark.parametrize("channels", [8, 20, 264])
def test_heads_that_no_kernel_takes_are_refused_where_kernels_are_used(channels):
    kernels_that_run()
    x = torch.zeros(1, 1, 4, channels)
    good = torch.zeros(1, 1, 4, 16)
    with kernels.choose("on"):
        for args, name in (((x, x, good), "q and k have"), ((good, good, x), "v have")):
            with pytest.raises(ValueError, match=f"{name} {channels} channels a head; .* multiples of 8 from 16 to"):
                attention(*args)
        attention(*3 * [x.double()])  # eager in float64
    assert attention(x, x, x).shape == x.shape


def test_wide_heads_in_float32_are_eager_where_their_gradients_do_not_fit(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "fused", lambda device: True)  # as on a GPU
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 99 * 1024)
    monkeypatch.setattr(autograd, "_triton", lambda: pytest.fail("a kernel was asked for"))
    kernels._log_once.cache_clear()
    q, k, v = (torch.randn(1, 1, 4, channels) for channels in (16, 16, 168))
    with kernels.choose("auto"), caplog.at_level(logging.WARNING, "genkit.kernels"):
        close(attention(q, k, v), attention(q, k, v, eager=True), 0)
        attention(q, k, v)
    assert [record.getMessage()[:70] for record in caplog.records] == [
        "computing eagerly, without fused kernels: 168 channels a head in float"
    ]
    with kernels.choose("on"), pytest.raises(RuntimeError, match="need 144 KiB of shared memory, and cpu has 99; take"):
        attention(q, k, v)
    monkeypatch.setattr(autograd, "_triton", lambda: closed_form)
    for x in ((q, k, v[..., :160]), [y.bfloat16() for y in (q, k, v)]):
        close(attention(*x), attention(*x, eager=True), 1e-2)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 163 * 1024)
    close(attention(q, k, v), attention(q, k, v, eager=True), 1e-5)


def test_kernels_that_are_demanded_and_not_there(monkeypatch):
    monkeypatch.setattr(kernels, "obstacle", lambda device_type: "triton is not installed: pip install triton")
    with kernels.choose("on"), pytest.raises(RuntimeError, match="pip install triton.*; or set GENKIT_KERNELS=off"):
        attention(q, k, v)
    assert not kernels.fused(torch.device("cuda"))  # auto: eager code
