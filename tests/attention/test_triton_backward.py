"""Gradients by the kernels, interpreted where there is no GPU, against float64 on the very inputs they get."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from genkit.attention import _triton_backward as kernels
from genkit.attention import attention, attention_with_tangent, reference
from genkit.attention._tiles import Tile
from genkit.attention.inputs import Options, check
from genkit.kernels import choose
from tests.attention import closed_form
from tests.needs import kernels_that_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels():
    kernels_that_run()


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
            return (*kernels.backward(*inputs, self.needs()[:4], tiles), None, None, None, None)
        inputs = (self.q, self.k, self.v, self.bias, self.mask, self.tq, self.tk, self.tv, self.tbias)
        return kernels.backward_with_tangent(*inputs, o, to, lse, mu, self.g, self.h, self.options, self.needs(), tiles)

    def needs(self) -> tuple[bool, ...]:
        return tuple(getattr(self, name) is not None for name in NAMES)

    def by_autograd(self) -> tuple[Tensor | None, ...]:
        """The same through eager attention in float64."""
        leaves = [double(getattr(self, name)) for name in NAMES]
        leaves = [None if x is None else x.requires_grad_() for x in leaves]
        q, k, v, bias, *tangents = leaves
        inputs = check(
            q, k, v, None if self.mask is None else self.mask.cpu(), bias, self.options.is_causal, self.options.scale
        )
        o, to = reference.attention_with_tangent(inputs, *tangents)
        loss = sum((x * double(up)).sum() for x, up in ((o, self.g), (to, self.h)) if up is not None) + 0 * o.sum()
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
SHAPES = [(1, 1, 1, 20, 40, 72, 40), (2, 1, 1, 20, 33, 40, 16), (1, 2, 1, 40, 20, 16, 72)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (DTYPES[::2] if i else DTYPES)]
)
def test_all_gradients_are_those_of_float64(shape, dtype):
    agree(problem(dtype, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ordinary_backward_is_that_of_float64(dtype):
    agree(problem(dtype, 1, 2, 1, 33, 20, 40, 72, to=False))


@pytest.mark.parametrize("shape", [(1, 1, 1, 20, 20, 256, 16), (1, 1, 1, 20, 20, 16, 136)])
def test_wide_heads(shape):
    """More channels than one pass has registers for."""
    agree(problem(torch.float32, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_inputs_lose_no_digits(dtype):
    given = problem(dtype, 1, 1, 1, 32, 64, 64, 64, hard=True)
    limit = {torch.float32: 2e-5, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    agree(given, limit)


def test_hard_inputs_are_hard_with_rounded_outputs():
    given = problem(torch.bfloat16, 1, 1, 1, 32, 64, 64, 64, hard=True)
    rounded = errors(given.by_kernels(torch.bfloat16), given.by_autograd())
    assert rounded["q"] > 1.5e-2  # what is saved in float32 is for this


@pytest.mark.parametrize("g", [True, False])
@pytest.mark.parametrize("tangents", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_absent_tangents_have_no_gradients(tangents, g):
    given = problem(torch.float32, 1, 1, 1, 20, 24, 16, 24, tangents=tangents, g=g)
    got, want = given.by_kernels(), given.by_autograd()
    for x, wanted in zip(got, want, strict=True):
        assert (x is None) == (wanted is None)
        assert x is None or (x - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("tangents", range(8))
def test_what_is_absent_is_not_loaded(tangents):
    there = [bool(tangents >> i & 1) for i in range(3)]
    given = problem(torch.float16, 1, 1, 1, 16, 16, 16, 16, tangents=there, g=False)
    inputs = (given.q, given.k, given.v, None, None, given.tq, given.tk, given.tv, None)
    plan, _ = kernels.launches(*inputs, *given.exact(), None, given.h, given.options, given.needs(), SMALL)
    for launch in plan[1:]:
        assert [launch.arguments[name] is not None for name in ("tq", "tk", "tv")] == there
        assert (launch.arguments["mu"] is None) == (launch.arguments["om"] is None) == (tangents & 3 == 0)
        assert launch.arguments["g"] is None


@pytest.mark.parametrize("to", [True, False])
@pytest.mark.parametrize("tile", [(32, 16), (16, 32)])
def test_queries_do_not_see_the_future(tile, to):
    tiles = kernels.Tiles(*[Tile(*tile, 4, 1)] * 3)
    agree(problem(torch.float32, 1, 1, 1, 40, 40, 16, 16, causal=True, to=to), tiles=tiles)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 36, 36), (2, 1, 1, 36), (1, 1, 36, 1)])
def test_masked_rows_have_no_gradients(shape, causal):
    mask = torch.rand(shape, device=DEVICE) > 0.4
    mask[0, 0, min(3, shape[2] - 1)] = False  # of keys: the whole first item
    given = replace(problem(torch.float32, *shape[:2], 1, 36, 36, 16, 16, causal=causal), mask=mask)
    got, want = given.by_kernels(), given.by_autograd()
    assert max(errors(got, want).values()) <= 2e-5
    empty = given.exact()[2] == float("-inf")
    assert empty.any()
    assert not got[0][empty].any() and not got[4][empty].any()


@pytest.mark.parametrize("shape", [(1, 2, 20, 20), (2, 1, 1, 20), (1, 1, 20, 20)])
def test_a_bias_has_gradients_of_its_own_shape(shape):
    bias, tbias = (torch.randn(shape, device=DEVICE) for _ in range(2))
    agree(replace(problem(torch.float32, 2, 2, 1, 20, 20, 16, 16), bias=bias, tbias=tbias))


@pytest.mark.parametrize("shape", [(1, 1, 36, 1), (1, 1, 1, 1)])
def test_a_bias_of_all_keys_has_no_gradient(shape):
    bias, tbias = (torch.randn(shape, device=DEVICE) for _ in range(2))
    got = replace(problem(torch.float32, 1, 1, 1, 36, 36, 16, 16), bias=bias, tbias=tbias).by_kernels()
    for x in (got[3], got[7]):
        assert x.shape == shape and x.abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_a_bias_that_masks(dtype):
    bias, tbias = (torch.randn(1, 2, 20, 36).to(dtype).to(DEVICE) for _ in range(2))
    bias[..., :33] = float("-inf")  # a whole tile
    bias[:, 0, 4] = float("-inf")
    mask = torch.rand(1, 1, 20, 36, device=DEVICE) > 0.1
    given = replace(problem(dtype, 1, 2, 1, 20, 36, 16, 24), bias=bias, mask=mask)
    agree(replace(given, h=None))
    agree(replace(given, tbias=tbias))
    only = problem(dtype, 1, 2, 1, 20, 36, 16, 24, tangents=(False,) * 3)
    agree(replace(only, bias=bias, tbias=tbias))  # it alone moves scores


def test_a_bias_that_needs_no_gradient_costs_no_kernel():
    given = problem(torch.float32, 1, 1, 1, 20, 20, 16, 16)
    bias = torch.zeros(1, 1, 1, 20, device=DEVICE)
    given = replace(given, bias=bias, tbias=bias)
    inputs = (given.q, given.k, given.v, bias, None, given.tq, given.tk, given.tv, bias, *given.exact())
    for needs, found in (((0, 0), 0), ((1, 0), 1), ((0, 1), 1)):
        asked = (True, True, True, bool(needs[0]), True, True, True, bool(needs[1]))
        plan, gradients = kernels.launches(*inputs, given.g, given.h, given.options, asked, SMALL)
        assert sum("ONE_ROW" in launch.arguments for launch in plan) == found
        assert tuple(x is not None for x in gradients) == asked
    full = torch.zeros(1, 1, 20, 20, device=DEVICE)
    plan, _ = kernels.launches(
        *inputs[:3], full, None, *inputs[5:8], full, *inputs[9:], given.g, given.h, given.options, (True,) * 8, SMALL
    )
    assert sum("ONE_ROW" in launch.arguments for launch in plan) == 1


@pytest.mark.parametrize(
    ("needed", "to"),
    [(name, True) for name in ("q", "v", "bias", "tk", "tbias", "q tq", "v tk")] + [("q", False), ("k v", False)],
)
def test_kernels_of_what_is_not_needed_are_not_launched(needed, to, monkeypatch):
    """And what is needed is the same, to the last bit."""
    bias = torch.randn(1, 1, 1, 20, device=DEVICE)
    given = replace(
        problem(torch.float32, 1, 1, 1, 20, 20, 16, 16, to=to), bias=bias, tbias=bias.clone() if to else None
    )
    needs = tuple(name in needed.split() for name in NAMES)
    o, tangent, lse, mu = given.exact()
    inputs = (given.q, given.k, given.v, bias, None)
    if to:
        inputs = (*inputs, given.tq, given.tk, given.tv, given.tbias, o, tangent, lse, mu, given.g, given.h)
        run = kernels.backward_with_tangent
    else:
        inputs = (*inputs, o, lse, given.g)
        run, needs = kernels.backward, needs[:4]
    launched = []
    real = kernels._run
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_run", lambda plan: launched.extend(launch.kernel for launch in plan) or real(plan))
        made = run(*inputs, given.options, needs, SMALL)
    kernel = {"q": kernels.of_queries, "tq": kernels.of_queries, "bias": kernels.of_bias, "tbias": kernels.of_bias}
    assert set(launched[1:]) == {kernel.get(name, kernels.of_keys) for name in needed.split()}
    everything = given.by_kernels()
    for x, whole, asked in zip(made, everything, needs, strict=False):
        assert (x is not None) == asked and (x is None or torch.equal(x, whole))


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_gradients_are_dual_to_tangents(dtype):
    """``<h, to(tx)> = <J^T h, tx>``, where the ordinary backward of ``h`` is ``J^T h``."""
    given = problem(dtype, 1, 2, 1, 20, 36, 40, 24, g=False)
    to = given.exact()[1].double()
    forward = (given.h.double() * to).sum()
    pulled = replace(given, g=given.h, h=None).by_kernels()[:3]
    backward = sum(
        (x.double() * tx.double()).sum() for x, tx in zip(pulled, (given.tq, given.tk, given.tv), strict=True)
    )
    size = given.h.double().norm() * to.norm()
    assert (forward - backward).abs() <= TOLERANCE[dtype] / 10 * size
    by_tangents = given.by_kernels()[4:7]  # to is linear in them, and so the same
    for x, y in zip(by_tangents, pulled, strict=True):
        assert (x.double() - y.double()).norm() <= TOLERANCE[dtype] * y.double().norm()


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_nothing_beyond_the_tensors_is_read_and_calls_repeat(dtype):
    given = problem(dtype, 1, 2, 1, 20, 36, 40, 24)
    around = {}
    for name in ("q", "k", "v", "tq", "tk", "tv", "g", "h"):
        x = getattr(given, name)
        b, h, n, d = x.shape
        larger = torch.full((b, h + 2, n + 40, d + 24), float("nan"), dtype=dtype, device=DEVICE)
        around[name] = larger[:, 1:-1, 8:-32, 8:-16]
        around[name].copy_(x)
    for got, want in zip(replace(given, **around).by_kernels(), given.by_kernels(), strict=True):
        assert got is None or torch.equal(got, want)


def test_tensors_have_any_strides():
    given = problem(torch.float32, 1, 2, 2, 20, 20, 16, 24)
    odd = {name: getattr(given, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "v", "h")}
    odd["k"] = given.k.mT.contiguous().mT  # neighbouring channels apart
    odd["tq"] = torch.cat([given.tq, given.tq[..., :3]], -1)[..., :16]  # no multiple of 8
    odd["g"] = torch.ones((), device=DEVICE).expand(given.g.shape)  # as from a sum
    agree(replace(given, **odd))
    agree(replace(given, h=given.h[:1, :, :1].expand(given.h.shape)))
    dq, dk, dv, *_ = given.by_kernels()
    assert all(x.transpose(1, 2).is_contiguous() for x in (dq, dk, dv))  # merging heads copies nothing


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale_has_any_sign(scale):
    given = replace(problem(torch.float32, 1, 1, 1, 20, 20, 16, 16), options=Options(scale, False))
    for x, wanted in zip(given.by_kernels(), given.by_autograd(), strict=True):
        assert x is None or (x - wanted).abs().max() <= 2e-5


def test_no_queries():
    given = problem(torch.float32, 1, 1, 1, 0, 20, 16, 16)
    bias = torch.zeros(1, 1, 1, 20, device=DEVICE)
    for x in replace(given, bias=bias, tbias=bias).by_kernels():
        assert not x.any()


def test_offsets_exceed_32_bits(tmp_path):
    """Heads are 2^31 elements apart, then queries 2^26, of which there are more than 2^31 / 2^26."""
    apart, d = 2**31 + 64, 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 2**29, dtype=torch.float16)
    if DEVICE == "cuda":
        storage = torch.empty(storage.shape, dtype=torch.float16, device=DEVICE)
    for shape, strides in (((1, 2, 16, d), (0, apart, 64, 1)), ((1, 1, 35, d), (0, 0, 2**26, 1))):
        given = problem(torch.float16, 1, shape[1], shape[1], shape[2], 16, d, d)
        names = ("q", "tq", "g", "h")
        far = [torch.as_strided(storage, shape, strides, i * d) for i in range(len(names))]
        agree(replace(given, **{name: x.copy_(getattr(given, name)) for name, x in zip(names, far, strict=True)}))


def test_the_fastest_tiles_are_taken(monkeypatch):
    asked = {}

    def fastest(key, tiles, run):
        tile = [x for x in tiles if x.stages == 1][0]
        run(tile)
        asked[key] = tile
        return tile

    monkeypatch.setattr(kernels._tuning, "wanted", lambda: True)
    monkeypatch.setattr(kernels._tuning, "fastest", fastest)
    given = problem(torch.float16, 1, 1, 1, 20, 20, 16, 16)
    agree(given, tiles=None)
    assert [(key[-1], tile) for key, tile in asked.items()] == [
        ("keys", Tile(16, 64, 4, 1)),
        ("queries", Tile(64, 16, 4, 1)),
    ]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_losses_of_values_and_tangents_have_gradients(dtype, together):
    given = problem(dtype, 1, 2, 1, 16, 36, 40, 24, hard=True)
    bias, tbias = (torch.randn(1, 2, 16, 36).to(dtype).to(DEVICE) for _ in range(2))
    given = replace(given, bias=bias, tbias=tbias, mask=torch.rand(1, 1, 16, 36, device=DEVICE) > 0.2)
    leaves = [getattr(given, name).clone().requires_grad_() for name in NAMES]
    with choose("on"):
        if together:
            q, k, v, bias, tq, tk, tv, tbias = leaves
            o, to = attention_with_tangent(q, k, v, tq, tk, tv, given.mask, bias, tbias)
        else:
            o, to = torch.func.jvp(
                lambda q, k, v, bias: attention(q, k, v, given.mask, bias), tuple(leaves[:4]), tuple(leaves[4:])
            )
        ((o * given.g).sum() + (to * given.h).sum()).backward()
    found = errors([x.grad for x in leaves], given.by_autograd())
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_losses_without_weights_have_gradients():
    """What comes back of a sum has no strides."""
    given = problem(torch.float32, 1, 2, 1, 20, 36, 16, 24)
    leaves = [getattr(given, name).clone().requires_grad_() for name in ("q", "k", "v")]
    with choose("on"):
        moving = (given.tq, given.tk, given.tv)
        o, to = torch.func.jvp(attention, tuple(leaves), moving)
        (o.sum() + 2 * to.sum()).backward()
    ones = torch.ones_like(given.g)
    want = replace(given, g=ones, h=2 * ones).by_autograd()
    for x, wanted in zip(leaves, want, strict=False):
        assert ((x.grad.cpu() - wanted).norm() / wanted.norm()).item() <= 2e-5
