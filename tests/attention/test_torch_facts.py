"""Ours in every construct in which PyTorch loses tangents or gradients: right, or refused, never silently zero.

Fused attention is that around the kernels' formulas in plain PyTorch (``closed_form``), which need no GPU.
"""

import threading
import warnings
import weakref

import pytest
import torch
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genkit import kernels
from genkit.attention import attention, attention_with_tangent, autograd, compiled
from genkit.attention.inputs import check
from tests.attention import closed_form
from tests.needs import kernels_that_run

SHAPE = (2, 3, 5, 16)
REMEDY = "fused attention has no forward mode within torch.compile; compile without fullgraph=True"
SECOND = r"no second derivatives.* set GENKIT_KERNELS=off, or keep both the forward and every backward of it within"
BATCHED = "fused attention has no torch.vmap.* take eager attention by eager=True or GENKIT_KERNELS=off"


@pytest.fixture(params=["eager", "fused"])
def way(request, monkeypatch):
    monkeypatch.setattr(autograd, "_triton", lambda: closed_form)
    monkeypatch.setattr(kernels, "obstacle", lambda device: None)  # the formulas run on any device
    with kernels.choose("off" if request.param == "eager" else "on"):
        yield request.param


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(autograd, "_triton", lambda: closed_form)
    monkeypatch.setattr(kernels, "obstacle", lambda device: None)
    with kernels.choose("on"):
        yield


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda fn, fullgraph=True: torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)
    torch._dynamo.reset()


def draw(n=6, *, grads=False):
    return [torch.randn(SHAPE).requires_grad_(grads) for _ in range(n)]


def exact(q, k, v, *tangents):
    """``(o, to)`` by the formulas, in float64."""
    inputs = check(*(x.detach().double() for x in (q, k, v)), None, None, False, None)
    arguments = (*inputs[:3], None, None, *(x.detach().double() for x in tangents), None, inputs.options, False)
    return [x.float() for x in closed_form.forward_with_tangent(*arguments)[:2]]


def close(made, expected, tolerance=2e-5):
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def jvp(*x, fn=attention):
    return torch.func.jvp(fn, x[:3], x[3:])


def dual_level(*x):
    with forward_ad.dual_level():
        o = attention(*map(forward_ad.make_dual, x[:3], x[3:]))
        return tuple(forward_ad.unpack_dual(o))


def loss_gradients(outputs, x):
    """Of a loss of value and tangent, to values and tangents."""
    return grad(sum(o.square().sum() for o in outputs), x)


@pytest.mark.parametrize("mode", [jvp, dual_level])
def test_forward_mode_and_the_gradient_of_it(way, mode):
    """PyTorch's default attention has neither, on no device."""
    x = draw(grads=True)
    made = mode(*x)
    close(made, exact(*x))
    with kernels.choose("off"):
        expected = loss_gradients(attention_with_tangent(*x), x)
    close(loss_gradients(made, x), expected, 1e-4)


def test_of_one_input_only(way):
    q, k, v, tq, _, _ = draw()
    _, to = torch.func.jvp(lambda q: attention(q, k, v), (q,), (tq,))
    close([to], exact(q, k, v, tq, 0 * k, 0 * v)[1:])


def test_vmap_is_right_or_refused(way):
    q, k, v = (torch.randn(4, *SHAPE) for _ in range(3))
    if way == "fused":
        for function in (
            attention,
            lambda *x: attention_with_tangent(*x, *x)[1],
            lambda *x: attention(*x, eager=False),
        ):
            with pytest.raises(RuntimeError, match=BATCHED):
                torch.vmap(function)(q, k, v)
        for jacobian in (torch.func.jacfwd, torch.func.jacrev):
            with pytest.raises(RuntimeError, match=BATCHED):
                jacobian(attention)(q[0], k[0], v[0])
        close(
            [torch.vmap(lambda *x: attention(*x, eager=True))(q[:2], k[:2], v[:2])],
            [attention(*(x[:2].flatten(0, 1) for x in (q, k, v))).unflatten(0, (2, -1))],
        )
    else:
        close([torch.vmap(attention)(q, k, v)], [torch.stack([attention(*x) for x in zip(q, k, v, strict=True)])])


def by_operator(q, k, v):
    return compiled.attention(check(q, k, v, None, None, False, None))


def as_exported(q, k, v):
    return compiled._forward(q, k, v, None, None, 0.25, False)[0]


def pair_as_exported(q, k, v):
    return compiled._pair(q, k, v, None, None, q, None, None, None, 0.25, False, True)[1]


@pytest.mark.parametrize("function", [as_exported, pair_as_exported])
def test_operators_refuse_forward_mode(fused, function):
    """PyTorch gives those a tangent of zero, or none."""
    x = draw()
    with pytest.raises(RuntimeError, match=REMEDY):
        jvp(*x, fn=function)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REMEDY):
        function(forward_ad.make_dual(x[0], x[3]), *x[1:3])


def test_what_is_not_compiled_after_all_keeps_its_rule(fused, monkeypatch):
    """As in a dual level, up to torch 2.11: see ``test_forward_mode_around_a_compiled_function``."""
    x = draw()
    close(jvp(*x, fn=by_operator), exact(*x))
    monkeypatch.setitem(globals(), "attention", by_operator)
    close(dual_level(*x), exact(*x))


def test_the_pair_refuses_forward_mode_where_it_is_fused(way):
    x = draw()

    def along(q):
        return attention_with_tangent(q, *x[1:])[1]

    if way == "fused":
        with pytest.raises(
            RuntimeError, match="fused attention_with_tangent has no forward mode.* call genkit.attention"
        ):
            torch.func.jvp(along, (x[0],), (x[3],))
    else:
        h, (q, dq) = 1e-3, (x[0], x[3])
        _, made = torch.func.jvp(along, (q,), (dq,))
        close([made], [(along(q + h * dq) - along(q - h * dq)) / (2 * h)], 5e-3)


def test_compiled_values_and_gradients(way, compiler):
    x, bias = draw(3, grads=True), torch.randn(1, 3, 5, 5, requires_grad=True)
    mask = torch.rand(2, 1, 5, 5) > 0.3

    def fn(q, k, v, bias):
        return attention(q, k, v, mask, bias)

    made, expected = (f(*x, bias) for f in (compiler(fn), fn))
    close([made], [expected])
    close(loss_gradients([made], [*x, bias]), loss_gradients([expected], [*x, bias]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_compiled_tangent_is_that_of_eager_mode_and_not_zero(way, compiler, requires_grad):
    x = draw(grads=requires_grad)
    expected = exact(*x)
    assert expected[1].abs().max() > 0.1
    if way == "fused":
        with pytest.raises(Exception, match=REMEDY):
            compiler(jvp)(*x)
        torch._dynamo.reset()
        made = compiler(jvp, fullgraph=False)(*x)
    else:
        made = compiler(jvp)(*x)
    close(made, expected)
    if requires_grad:
        close(loss_gradients(made, x), loss_gradients(jvp(*x), x), 1e-4)


@pytest.mark.parametrize("mode", [jvp, dual_level])
def test_forward_mode_around_a_compiled_function(way, compiler, mode, monkeypatch):
    """Also after it was compiled without: what was compiled then does not serve."""
    x = draw()
    function = compiler(attention, fullgraph=False)
    close([function(*x[:3])], exact(*x)[:1])
    monkeypatch.setitem(globals(), "attention", function)
    made = jvp(*x, fn=function) if mode is jvp else dual_level(*x)
    close(made, exact(*x))


def test_views_as_inputs_of_a_compiled_tangent(way, compiler):
    """PyTorch may fail there, within itself; that must show, and leave forward mode as it was."""
    qkv, tangents = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    x = (*qkv.unbind(), *tangents.unbind())
    try:
        close(compiler(jvp, fullgraph=False)(*x), exact(*x))
    except RuntimeError as error:
        assert "has_fw_view" in str(error) or "INTERNAL ASSERT" in str(error)
    close(jvp(*x), exact(*x))
    inside = compiler(lambda x, t: jvp(*x.unbind(), *t.unbind()), fullgraph=False)
    close(inside(qkv, tangents), exact(*x))


@pytest.mark.parametrize("given", ["111", "100", "011"])
@pytest.mark.parametrize("used", ["both", "value", "tangent"])
def test_the_compiled_pair(way, compiler, given, used):
    q, k, v, *tangents = draw(grads=True)
    tangents = [t if g == "1" else None for t, g in zip(tangents, given, strict=True)]
    bias, tbias = (torch.randn(1, 3, 5, 5, requires_grad=True) for _ in range(2))
    part = {"both": slice(None), "value": slice(1), "tangent": slice(1, 2)}[used]
    x = [q, k, v, bias, *(t for t in tangents if t is not None), tbias]

    def fn(q, k, v, *tangents):
        return attention_with_tangent(q, k, v, *tangents, None, bias, tbias)

    results = []
    for function in (compiler(fn), fn):
        made = function(q, k, v, *tangents)[part]
        loss = sum(o.square().sum() for o in made)
        results.append((*made, *grad(loss, x, materialize_grads=True)))
    close(*results)


@pytest.mark.parametrize("needed", [(0,), (1, 2), (3,), (4, 5)])
def test_the_compiled_pair_computes_what_is_needed(fused, compiler, needed, monkeypatch):
    asked = []

    class Asked:
        forward_with_tangent, backward = closed_form.forward_with_tangent, closed_form.backward

        @staticmethod
        def backward_with_tangent(*arguments):
            asked.append(arguments[-1])
            return closed_form.backward_with_tangent(*arguments)

    monkeypatch.setattr(autograd, "_triton", lambda: Asked)
    x = [y.requires_grad_(i in needed) for i, y in enumerate(draw())]
    results = []
    for function in (compiler(attention_with_tangent), attention_with_tangent):
        results.append(loss_gradients(function(*x), [x[i] for i in needed]))
    close(*results)
    needs = [i in needed for i in range(6)]
    assert asked == 2 * [(*needs[:3], False, *needs[3:], False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_are_what_they_tell_the_compiler(fused, dtype, monkeypatch):
    """Shapes, strides, dtypes and aliases, with and without gradients."""
    if dtype != torch.float32:  # the formulas compute in the inputs' dtype; kernels give float32 where it is asked for
        monkeypatch.setattr(autograd, "_triton", lambda: _Half)
    x = [torch.randn(2, 5, 3, 16, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    tangents = [torch.randn_like(y) for y in x]
    bias, mask = torch.randn(1, 3, 5, 5, dtype=dtype, requires_grad=True), torch.rand(2, 1, 5, 5) > 0.2
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compiled._forward, (*x, bias, mask, 0.25, False), test_utils=checks)
    for precise in (False, True):
        arguments = (*x, bias, mask, tangents[0], None, tangents[2], bias.detach(), 0.25, False, precise)
        torch.library.opcheck(compiled._pair, arguments, test_utils=checks)


class _Half:
    """The formulas as kernels of half precision: statistics, and what is asked for precisely, in float32."""

    @staticmethod
    def forward(*arguments):
        o, lse = closed_form.forward(*arguments)
        return o, lse.float()

    @staticmethod
    def forward_with_tangent(*arguments):
        o, to, lse, mu, _, _ = closed_form.forward_with_tangent(*arguments)
        o_exact, to_exact = (o.float(), to.float()) if arguments[-1] else (None, None)
        return o, to, lse.float(), mu.float(), o_exact, to_exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_pair_by_kernels(compiler, dtype):
    """Those of Triton, interpreted where there is no GPU."""
    kernels_that_run()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = [torch.randn(1, 9, 2, 16, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(6)]
    results = []
    with kernels.choose("on"):
        for function in (compiler(attention_with_tangent), attention_with_tangent):
            made = function(*x)
            assert all(o.transpose(1, 2).is_contiguous() for o in made)  # heads are merged without a copy
            results.append((*made, *loss_gradients(made, x)))
    close(*results, 0)
    if dtype == torch.float32:
        close([o.cpu() for o in results[0][:2]], exact(*(y.cpu() for y in x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_within_forward_mode_is_right_or_refused(way, reentrant):
    x = draw(grads=True)

    def block(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=reentrant)

    expected = jvp(*x)
    try:
        made = jvp(*x, fn=block)
        close(made, expected)
        gradients = loss_gradients(made, x)
    except (RuntimeError, NotImplementedError) as error:  # among them CheckpointError
        assert str(error)
    else:
        close(gradients, loss_gradients(expected, x))
    close(jvp(*x), expected)  # nothing of it stays behind


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_computed_again_as_it_was_chosen_in_another_thread(fused, monkeypatch, reentrant):
    """As CUDA's backward is. Here kernels are demanded outside, and not there within."""
    monkeypatch.setattr(autograd, "_triton", lambda: pytest.fail("a kernel was asked for"))
    x, found = draw(3, grads=True), []
    with kernels.choose("off"):
        o = checkpoint(attention, *x, use_reentrant=reentrant)
        thread = threading.Thread(target=lambda: found.append(o.square().sum().backward()))
        thread.start()
        thread.join()
        expected = attention(*x)
    assert found == [None]
    close([y.grad for y in x], grad(expected.square().sum(), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_mode_within_a_checkpointed_function(way, reentrant):
    x = draw(grads=True)
    made, expected = checkpoint(jvp, *x, use_reentrant=reentrant), jvp(*x)
    close(made, expected)
    sum(o.square().sum() for o in made).backward()  # for a reentrant one grad() will not do
    close([y.grad for y in x], loss_gradients(expected, x))


def test_without_gradients_nothing_stays_saved(way):
    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    x, dx, kept = torch.randn(SHAPE), torch.randn(SHAPE), weakref.WeakSet()
    weights = torch.randn(3, 16, 16, requires_grad=True)

    def layer(x):
        return attention(*(x @ w for w in weights.unbind()))

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.tensor):
        with torch.no_grad():
            without = torch.func.jvp(layer, (x,), (dx,))
        assert len(kept) == 0 and not any(o.requires_grad for o in without)
        recorded = torch.func.jvp(layer, (x,), (dx,))
        assert len(kept) > 0 and all(o.requires_grad for o in recorded)
    close(without, recorded)


def test_a_group_norm_of_it(way):
    """Up to 2.13 PyTorch's stumbles over the layout of the tangent unless it is made contiguous."""
    x = draw()
    shape = (2, 48, 5)

    def fn(q, k, v):
        o = attention(q, k, v).transpose(2, 3).reshape(shape).contiguous()
        return F.group_norm(o, 4)

    _, made = jvp(*x, fn=fn)
    h, doubles = 1e-5, [y.double() for y in x]
    with kernels.choose("off"):
        ends = [fn(*(p + s * h * t for p, t in zip(doubles[:3], doubles[3:], strict=True))) for s in (1, -1)]
    close([made], [((ends[0] - ends[1]) / (2 * h)).float()], 1e-4)


def second_derivatives(fn, q, dq):
    """Each a second derivative, by every order in which PyTorch composes them."""
    leaf = q.clone().requires_grad_()
    first = torch.func.grad(lambda x: fn(x).square().sum())
    return {
        "double backward": lambda: grad(grad(fn(leaf).square().sum(), leaf, create_graph=True)[0].sum(), leaf),
        "grad of grad": lambda: torch.func.grad(lambda x: first(x).sum())(q),
        "jvp of grad": lambda: torch.func.jvp(first, (q,), (dq,)),
        "jvp of jvp": lambda: torch.func.jvp(lambda x: torch.func.jvp(fn, (x,), (dq,))[1], (q,), (dq,)),
        "double backward of a jvp": lambda: grad(
            grad(torch.func.jvp(fn, (leaf,), (dq,))[1].square().sum(), leaf, create_graph=True)[0].sum(), leaf
        ),
    }


@pytest.mark.parametrize("name", second_derivatives(lambda x: x, torch.ones(1), torch.ones(1)))
def test_second_derivatives_of_fused_attention_raise(name):
    q, k, v = torch.randn(3, *SHAPE, dtype=torch.float64)

    def fn(x):
        return autograd.attention(check(x, k, v, None, None, False, None), closed_form)

    with pytest.raises(RuntimeError, match=SECOND):
        second_derivatives(fn, q, k)[name]()


def test_derivatives_of_eager_attention_of_any_order():
    """Against finite differences: in either mode, in either order, and of the tangent, too."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    q, k, v, bias = normal(1, 2, 3, 4), normal(1, 1, 4, 4), normal(1, 1, 4, 3), normal(1, 2, 3, 1)
    tangents = [normal(*x.shape) for x in (q, k, v, bias)]
    mask = torch.rand(1, 1, 3, 4, generator=generator) > 0.4
    mask[..., 1, :] = False  # nothing to attend to

    def value(q, k, v, bias):
        return attention(q, k, v, mask, bias)

    def tangent(q, k, v, bias, tq, tk, tv, tbias):
        return attention_with_tangent(q, k, v, tq, tk, tv, mask, bias, tbias)

    def by_jvp(*x):
        return torch.func.jvp(value, x[:4], x[4:])[1]

    x = (q, k, v, bias)
    assert gradcheck(value, x, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(value, x, check_fwd_over_rev=True, fast_mode=True)
    for fn in (tangent, by_jvp):
        assert gradcheck(fn, (*x, *tangents), check_forward_ad=fn is tangent, fast_mode=True)
        assert gradgradcheck(fn, (*x, *tangents), fast_mode=True)
