"""The kernels, interpreted where there is no GPU, against float64 on the very inputs they get."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from genkit.attention import _triton_forward as kernels
from genkit.attention import attention_with_tangent
from genkit.attention._tiles import Tile, split, unit
from genkit.attention.inputs import check
from genkit.kernels import choose
from tests.attention import closed_form
from tests.needs import kernels_that_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels():
    kernels_that_run()


TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
SMALL = Tile(32, 32, 4, 1)
# b, h, heads of k, m, n, d, dv: ragged both ways, channels that are split or padded, queries that share keys
SHAPES = [
    (1, 1, 1, 33, 40, 72, 40),
    (1, 2, 1, 20, 35, 64, 72),
    (2, 1, 1, 33, 20, 16, 24),
    (1, 1, 1, 17, 32, 40, 64),
    (1, 1, 1, 20, 40, 128, 152),
    (1, 1, 1, 20, 20, 256, 256),
]


def problem(dtype, b, h, hk, m, n, d, dv, hard=False):
    """``q, k, v, tq, tk, tv``. Hard: tangents of keys have a common part of size 4 a channel, values an offset."""
    q, k, v, tq, tk, tv = (torch.randn(s) for s in ((b, h, m, d), (b, hk, n, d), (b, hk, n, dv)) * 2)
    if hard:
        tk, v = tk + 4 * torch.randn(d), v + 4 * torch.randn(dv)
    return [x.to(dtype).to(DEVICE) for x in (q, k, v, tq, tk, tv)]


def exact(tensors, mask=None, bias=None, tbias=None, causal=False, scale=None):
    """``o, to, lse, mu`` in float64."""
    q, k, v, tq, tk, tv, bias, tbias = (_double(x) for x in (*tensors, bias, tbias))
    mask = None if mask is None else mask.cpu()
    _, _, _, mask, bias, options = check(q, k, v, mask, bias, causal, scale)
    return closed_form.forward_with_tangent(q, k, v, bias, mask, tq, tk, tv, tbias, options, False)[:4]


def fused(tensors, mask=None, bias=None, tbias=None, causal=False, scale=None, precise=False, tile=SMALL):
    """All six outputs in one pass."""
    q, k, v, tq, tk, tv = tensors
    _, _, _, mask, bias, options = check(q, k, v, mask, bias, causal, scale)
    return kernels.forward_with_tangent(q, k, v, bias, mask, tq, tk, tv, tbias, options, precise, tile)


def separate(tensors, mask=None, bias=None, tbias=None, causal=False, scale=None, precise=False, tile=SMALL):
    """The same in two passes."""
    q, k, v, tq, tk, tv = tensors
    _, _, _, mask, bias, options = check(q, k, v, mask, bias, causal, scale)
    o, lse = kernels.forward(q, k, v, bias, mask, options, tile)
    to, mu, o_exact, to_exact = kernels.tangent(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, precise, tile)
    return o, to, lse, mu, o_exact, to_exact


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def close(got, want, dtype):
    for x, wanted in zip(got[:2], want[:2], strict=True):
        assert x.dtype == dtype
        assert error(x, wanted) <= TOLERANCE[dtype]
    assert got[2].dtype == got[3].dtype == torch.float32
    finite = want[2] > float("-inf")
    assert torch.equal(got[2].cpu() > float("-inf"), finite)
    assert error(got[2].cpu()[finite], want[2][finite]) <= 1e-5
    assert error(got[3], want[3]) <= TOLERANCE[dtype]


def _double(x):
    return None if x is None else x.cpu().double()


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (DTYPES if i < 2 else DTYPES[::2])],
)
def test_values_and_tangents_are_those_of_float64(shape, dtype, passes):
    tensors = problem(dtype, *shape)
    close(passes(tensors), exact(tensors), dtype)


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_inputs_lose_no_digits(dtype, passes):
    tensors = problem(dtype, 1, 1, 1, 32, 128, 128, 128, hard=True)
    want = exact(tensors)
    got = passes(tensors)
    close(got, want, dtype)
    assert error(got[1], want[1]) <= {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]


def test_hard_inputs_are_hard_for_the_uncentred_form():
    q, k, v, tq, tk, tv = problem(torch.bfloat16, 1, 1, 1, 32, 128, 128, 128, hard=True)
    want = exact((q, k, v, tq, tk, tv))[1]
    q, k, v, tq, tk, tv = (x.cpu().float() for x in (q, k, v, tq, tk, tv))
    s, t = q @ k.mT * 128**-0.5, (tq @ k.mT + q @ tk.mT) * 128**-0.5
    e = torch.exp(s - s.amax(-1, keepdim=True))
    total = e.sum(-1, keepdim=True)
    as_operand = [x.bfloat16().float() for x in (e, e * t)]
    plain = (as_operand[1] @ v + as_operand[0] @ tv) / total
    plain -= (e * t).sum(-1, keepdim=True) / total * (as_operand[0] @ v / total)
    assert 1.5e-2 <= error(plain, want) <= 4e-2


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize("tile", [SMALL, Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)])
def test_queries_do_not_see_the_future(tile, passes):
    tensors = problem(torch.float32, 1, 1, 1, 40, 40, 32, 16)
    close(passes(tensors, causal=True, tile=tile), exact(tensors, causal=True), torch.float32)


MASKS = {
    "every entry": (2, 2, 20, 40),
    "every head's the same": (2, 1, 20, 40),
    "keys": (2, 1, 1, 40),
    "queries": (1, 2, 20, 1),
}


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize("kind", list(MASKS))
def test_masked_rows_are_zero(kind, passes):
    tensors = problem(torch.float32, 2, 2, 1, 20, 40, 16, 16)
    mask = torch.rand(MASKS[kind], device=DEVICE) > 0.4
    mask[0, 0, min(3, mask.shape[2] - 1)] = False  # keys: the whole first item
    mask[-1, -1, -1, : mask.shape[3] - 2] = False  # the first keys seen are in the second tile
    want = exact(tensors, mask)
    got = passes(tensors, mask)
    close(got, want, torch.float32)
    empty = want[2] == float("-inf")
    assert empty.any()
    for x in (got[0], got[1], got[3]):
        assert not x.cpu()[empty].any()


def test_a_mask_and_the_future():
    tensors = problem(torch.float32, 1, 1, 1, 40, 40, 16, 16)
    mask = torch.rand(1, 1, 40, 40, device=DEVICE) > 0.5
    for passes in (fused, separate):
        close(passes(tensors, mask, causal=True), exact(tensors, mask, causal=True), torch.float32)


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1, 20, 40), torch.bfloat16), ((1, 2, 20, 40), torch.float32), ((2, 1, 1, 40), torch.float32)],
)
def test_a_bias_has_a_tangent(shape, dtype, passes):
    tensors = problem(dtype, 2 // shape[1], shape[1], 1, 20, 40, 16, 16)
    bias, tbias = (torch.randn(shape).to(dtype).to(DEVICE) for _ in range(2))
    bias[..., :33] = float("-inf")  # an additive mask of a whole tile
    close(passes(tensors, None, bias, tbias), exact(tensors, None, bias, tbias), dtype)
    wide = tbias[:, :, :1].expand(shape)  # its own strides: a vector, where the bias has rows
    close(passes(tensors, None, bias, wide), exact(tensors, None, bias, wide), dtype)


@pytest.mark.parametrize("passes", [fused, separate])
def test_absent_tangents_are_zero(passes):
    tensors = problem(torch.float32, 1, 1, 1, 20, 32, 16, 24)
    for present in range(8):
        some = [*tensors[:3], *(x if present >> i & 1 else None for i, x in enumerate(tensors[3:]))]
        zeros = [x if y is None else y for x, y in zip(map(torch.zeros_like, tensors), some, strict=True)]
        got, want = passes(some), exact(zeros)
        assert error(got[0], want[0]) < 2e-5
        for i in (1, 3):
            assert (got[i].cpu() - want[i]).abs().max() < 1e-5


@pytest.mark.parametrize("tangents", range(8))
def test_absent_tangents_are_not_loaded(tangents):
    q, k, v, *given = problem(torch.float16, 1, 1, 1, 16, 16, 16, 16)
    given = [x if tangents >> i & 1 else None for i, x in enumerate(given)]
    options = check(q, k, v, None, None, False, None).options
    (launched,), _, _ = kernels.launches(q, k, v, None, None, None, *given, None, options, True, False, SMALL, 0)
    assert [launched[name] is None for name in ("tq", "tk", "tv")] == [x is None for x in given]
    assert launched["MOVES"] == (tangents & 3 > 0)
    lse = torch.zeros(1, 1, 16, device=DEVICE)
    (launched,), _, _ = kernels.launches(q, k, v, None, None, lse, *given, None, options, True, False, SMALL, 0)
    assert launched["VALUES"] == (tangents & 3 > 0)  # only then is o subtracted


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precise_outputs_are_the_same_before_rounding(dtype, passes):
    tensors = problem(dtype, 1, 1, 1, 20, 40, 16, 40)
    want = exact(tensors)
    o, to, _, _, o_exact, to_exact = passes(tensors, precise=True)
    assert (o_exact is None) == (dtype == torch.float32 and passes is fused)
    assert (to_exact is None) == (dtype == torch.float32)
    for rounded, full, wanted in ((o, o_exact, want[0]), (to, to_exact, want[1])):
        if full is not None:
            assert full.dtype == torch.float32 and error(full, wanted) <= TOLERANCE[dtype]
            assert error(rounded, full.cpu().double()) <= TOLERANCE[dtype] / 4
    assert passes(tensors)[4:] == (None, None)


@pytest.mark.parametrize("passes", [fused, separate])
def test_what_is_common_to_all_keys_does_not_matter(passes):
    q, k, v, tq, tk, tv = problem(torch.float32, 1, 1, 1, 20, 32, 16, 16)
    want = exact((q, k, v, tq, tk, tv))[1]
    common = torch.randn(16, device=DEVICE)
    for moved in ((k + common, v, tk), (k, v + common, tk), (k, v, tk + common)):
        assert error(passes((q, moved[0], moved[1], tq, moved[2], tv))[1], want) < 2e-5


@pytest.mark.parametrize("passes", [fused, separate])
def test_a_tangent_is_linear(passes):
    tensors = problem(torch.float32, 1, 1, 1, 20, 40, 16, 16)
    others = [torch.randn_like(x) for x in tensors[3:]]
    parts = [passes((*tensors[:3], *moved))[1] for moved in (tensors[3:], others)]
    both = passes((*tensors[:3], *(2 * x - y for x, y in zip(tensors[3:], others, strict=True))))[1]
    assert error(both, (2 * parts[0] - parts[1]).cpu().double()) < 2e-5


@pytest.mark.parametrize("passes", [fused, separate])
def test_special_cases_have_their_values(passes):
    q, k, v, tq, tk, tv = problem(torch.float32, 1, 1, 1, 20, 40, 16, 16)
    uniform = passes((torch.zeros_like(q), k, v, torch.zeros_like(q), tk, tv))[1]
    assert error(uniform, tv.cpu().double().mean(2, keepdim=True).expand(1, 1, 20, 16)) < 2e-5
    alone = passes((q, k[:, :, :1], v[:, :, :1], tq, tk[:, :, :1], tv[:, :, :1]))[1]
    assert error(alone, tv[:, :, :1].cpu().double().expand(1, 1, 20, 16)) < 2e-5


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
def test_scale_has_any_sign(scale):
    tensors = problem(torch.float32, 1, 1, 1, 20, 40, 16, 16)
    want = exact(tensors, scale=scale)
    for passes in (fused, separate):
        got = passes(tensors, scale=scale)
        for x, wanted in zip(got[:4], want, strict=True):
            assert (x.cpu() - wanted).abs().max() < 1e-5


def test_scores_far_apart():
    tensors = problem(torch.float16, 1, 1, 1, 20, 70, 16, 16)
    tensors[0] *= 30
    for passes in (fused, separate):
        close(passes(tensors), exact(tensors), torch.float16)


@pytest.mark.parametrize("passes", [fused, separate])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beyond_the_tensors_is_read(dtype, passes):
    tensors = problem(dtype, 1, 1, 1, 20, 40, 40, 24)
    around = []
    for x in tensors:
        b, h, n, d = x.shape
        larger = torch.full((b, h + 2, n + 40, d + 24), float("nan"), dtype=dtype, device=DEVICE)
        inside = larger[:, 1:-1, 8:-32, 8:-16]
        inside.copy_(x)
        around.append(inside)
    for got, want in zip(passes(around)[:4], passes(tensors)[:4], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("passes", [fused, separate])
def test_tensors_have_any_strides(passes):
    tensors = problem(torch.float32, 2, 1, 1, 20, 20, 16, 24)
    want = exact(tensors)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]  # as from a linear layer
    odd[1] = tensors[1].mT.contiguous().mT  # neighbouring channels apart
    odd[3] = torch.cat([tensors[3], tensors[3][..., :3]], -1)[..., :16]  # no multiple of 8
    assert unit(*odd) == 1 and unit(*tensors) == 8
    close(passes(odd), want, torch.float32)
    tensors[5] = tensors[5][:1, :1, :1, :1].expand(tensors[5].shape)
    close(passes(tensors), exact(tensors), torch.float32)


def test_tangents_without_memory_are_zero():
    """As forward mode gives where it knows them: of the bias, too, and backwards."""
    x = [y.requires_grad_() for y in problem(torch.float32, 1, 1, 1, 20, 20, 16, 16)[:3]]
    bias = torch.randn(1, 1, 20, 20, device=DEVICE, requires_grad=True)
    tangents = [torch._efficientzerotensor(y.shape, device=DEVICE) for y in (*x, bias)]
    assert all(y._is_zerotensor() for y in tangents)
    tangents[1] = torch.randn_like(x[1])
    results = []
    for zero in (tangents, [torch.zeros_like(y) if y._is_zerotensor() else y for y in tangents]):
        with choose("on"):
            o, to = attention_with_tangent(*x, *zero[:3], bias=bias, tbias=zero[3])
        results.append((o, to, *torch.autograd.grad((o + to.square()).sum(), [*x, bias])))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_offsets_exceed_32_bits(tmp_path):
    """Heads are 2^31 elements apart, then keys 2^26, of which there are more than 2^31 / 2^26."""
    apart, d = 2**31 + 64, 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 2**29, dtype=torch.float16)
    if DEVICE == "cuda":
        storage = torch.empty(storage.shape, dtype=torch.float16, device=DEVICE)
    tensors = problem(torch.float16, 1, 2, 2, 16, 16, d, d)
    far = [torch.as_strided(storage, (1, 2, 16, d), (0, apart, 64, 1), i * d) for i in range(3)]
    far = [x.copy_(y) for x, y in zip(far, tensors, strict=False)]
    close(fused((*far, *tensors[3:])), exact(tensors), torch.float16)
    tensors = problem(torch.float16, 1, 1, 1, 16, 35, d, d)
    far = [torch.as_strided(storage, (1, 1, 35, d), (0, 0, 2**26, 1), i * d) for i in range(2)]
    far = [x.copy_(y) for x, y in zip(far, tensors[1:], strict=False)]
    close(fused((tensors[0], *far, *tensors[3:])), exact(tensors), torch.float16)


def test_offsets_in_a_mask_exceed_32_bits(tmp_path):
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=20 * 2**27, dtype=torch.bool)
    if DEVICE == "cuda":
        storage = torch.empty(storage.shape, dtype=torch.bool, device=DEVICE)
    tensors = problem(torch.float32, 1, 1, 1, 20, 32, 16, 16)
    mask = torch.as_strided(storage, (1, 1, 20, 32), (0, 0, 2**27, 1)).copy_(torch.rand(20, 32) > 0.5)
    close(fused(tensors, mask), exact(tensors, mask), torch.float32)


def test_outputs_merge_heads_without_a_copy():
    tensors = problem(torch.float32, 2, 2, 2, 20, 16, 16, 24)
    o, to = fused(tensors)[:2]
    assert o.transpose(1, 2).is_contiguous() and o.stride() == to.stride()


def test_no_queries():
    tensors = problem(torch.float32, 1, 1, 1, 0, 16, 16, 16)
    assert fused(tensors)[0].shape == (1, 1, 0, 16)


@pytest.mark.parametrize(
    ("channels", "parts"),
    [(16, (16, 0)), (40, (32, 16)), (72, (64, 16)), (104, (128, 0)), (192, (128, 64)), (200, (256, 0))],
)
def test_channels_are_padded_little(channels, parts):
    assert split(channels) == parts
