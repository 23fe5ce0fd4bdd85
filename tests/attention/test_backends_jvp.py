"""Networks under ``torch.func.jvp`` with our attention against PyTorch's math attention: value, tangent, gradients."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import LlamaModel

from genkit import kernels
from genkit.attention import register_backend, sdpa, use
from genkit.training.parts.forward_mode import exact_jvp
from tests.attention._networks import NAMES, build
from tests.needs import kernels_that_run


class _PlainLayerNorm(TorchFunctionMode):
    """Gradients of tangents of the fused one are wrong, https://github.com/pytorch/pytorch/issues/196700."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_layer_norm if func is F.layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(shape), 0))
    y = (x - x.mean(axes, keepdim=True)) * torch.rsqrt(x.var(axes, correction=0, keepdim=True) + eps)
    return (y if weight is None else y * weight) + (0 if bias is None else bias)


def derivatives(net):
    """Value, tangent, and gradients of a loss of both to the input and to every weight, by name."""
    generator = torch.Generator().manual_seed(3)
    x = net.x.clone().requires_grad_()
    with _PlainLayerNorm():
        o, to = torch.func.jvp(net.call, (x,), (torch.randn(x.shape, generator=generator),))
    weights = [torch.randn(o.shape, generator=generator) for _ in range(2)]
    loss = (o * weights[0]).sum() + (to * weights[1]).sum()
    inputs = {"x": x, **dict(net.module.named_parameters())}
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = {"value": o.detach(), "tangent": to.detach()}
    return found | {name: g for name, g in zip(inputs, grads, strict=True) if g is not None}


def exact(net):
    """The same by math attention: PyTorch's, or Transformers', since PyTorch's is nan with padding on the left."""
    with sdpa_kernel(SDPBackend.MATH):
        if not isinstance(net.module, LlamaModel):
            return derivatives(net)
        net.module.set_attn_implementation("eager")
        expected = derivatives(net)
        net.module.set_attn_implementation("sdpa")
    return expected


def assert_same(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys() and len(got) > 10
    for name, right in expected.items():
        scale = right.norm()
        if name.endswith("bias"):  # that of keys moves no softmax: its gradient is nothing but rounding
            scale = torch.maximum(scale, 0.1 * expected.get(name.replace("bias", "weight"), right).norm())
        error = (got[name] - right).norm()
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_networks_agree_with_math_attention(tiny_pipeline, name):
    net = build(name, tiny_pipeline)
    expected = exact(net)
    assert expected["tangent"].norm() > 1e-2
    with use(net.module, tangent=True) as chosen:
        assert chosen.backend == {"": "genkit"}
        assert_same(derivatives(net), expected)
    with pytest.raises(NotImplementedError, match="forward AD"):
        derivatives(net)


@custom_op("genkit_tests::opaque", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def opaque(query, key, value, attn_mask=None, is_causal=False, scale=None):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    return _opaque(q, k, v, attn_mask, is_causal).transpose(1, 2)


@pytest.mark.parametrize(
    "name, backend",
    [("flux", "flex"), *((name, backend) for name in ("flux", "dit", "llama") for backend in ("native", "opaque"))],
)
def test_backends_without_forward_mode_say_so(tiny_pipeline, name, backend):
    """Also those, as of operators of one's own, of which PyTorch says that the tangent is zero."""
    register_backend("opaque", opaque)
    net = build(name, tiny_pipeline)
    with pytest.raises(
        ValueError, match=f"backend='{backend}' does not compute .* tangents: .*for tangents take 'genkit'"
    ):
        use(net.module, backend, tangent=True)
    with torch.no_grad(), use(net.module, backend):
        net.call(net.x)
        for mode in (torch.func.jvp, dual_level):
            with pytest.raises(Exception) as said:
                mode(net.call, (net.x,), (torch.ones_like(net.x),))
            assert backend != "opaque" or "'opaque' loses tangents; take 'genkit'" in str(said.value)


def dual_level(fn, primals, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(*map(forward_ad.make_dual, primals, tangents)))


@pytest.mark.parametrize("how", ["func", "dual"])
@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_trainers_differentiate_through_it(tiny_pipeline, name, how):
    net = build(name, tiny_pipeline)
    arguments = net.call, (net.x,), (torch.ones_like(net.x),)
    with torch.no_grad():
        expected = exact_jvp(*arguments, "func")
        with use(net.module, tangent=True):
            got = exact_jvp(*arguments, how)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_kernels_in_a_network_agree_with_math_attention(tiny_pipeline, monkeypatch):
    """Grouped heads, causality, and rows of which all is masked, by kernels."""
    kernels_that_run()
    net = build("llama", tiny_pipeline)
    expected = exact(net)
    fused = []
    real = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args: fused.append(kernels.fused(args[0].device)) or real(*args))
    with kernels.choose("on"), use(net.module, "genkit", tangent=True):
        fused.clear()
        got = derivatives(net)
    assert fused == [True] * net.calls
    assert_same(got, expected)
