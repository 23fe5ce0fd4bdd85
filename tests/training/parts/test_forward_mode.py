"""Derivatives along a direction: dual numbers and torch.func against each other, against differences, and refused."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genkit import kernels
from genkit.attention import attention, autograd
from genkit.denoisers import TwoTime, from_pipeline, wrap
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.training.parts.dual import Dual, NoRule, dual_jvp
from genkit.training.parts.forward_mode import exact_jvp, obstacle
from genkit.training.parts.residuals import directional_derivative, flow_map, lagrangian
from tests.attention import closed_form
from tests.needs import kernels_that_run

F64 = torch.float64
GENERATOR = torch.Generator()


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=GENERATOR)


W, BIAS, KERNEL, MATRIX, KEYS = normal(8), normal(8), normal(4, 8, 3, 3), normal(8, 8), normal(2, 3, 8, 8)
SEEN = torch.ones(8, 8, dtype=torch.bool).tril(1)

FUNCTIONS = {
    "layer_norm": (lambda x: F.layer_norm(x, (8,)), (5, 8)),
    "layer_norm with weights": (lambda x: F.layer_norm(x, (8,), W, BIAS), (5, 8)),
    "group_norm": (lambda x: F.group_norm(x, 2, W, BIAS), (3, 8, 4)),
    "rms_norm": (lambda x: F.rms_norm(x, (8,), W, 1e-6), (5, 8)),
    "gelu": (F.gelu, (5, 8)),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), (5, 8)),
    "silu": (F.silu, (5, 8)),
    "softmax": (lambda x: torch.softmax(x, -1), (5, 8)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x * x, value=x.sin()), (2, 3, 5, 8)),
    "masked attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()),
        (2, 5, 8),
    ),
    "causal attention of groups": (
        lambda x: F.scaled_dot_product_attention(
            x, x[:, :2, :4].sin(), x[:, :2, :4], is_causal=True, scale=0.7, enable_gqa=True
        ),
        (2, 4, 5, 8),
    ),
    "attention by a bias": (lambda x: F.scaled_dot_product_attention(KEYS, KEYS, KEYS, x), (2, 3, 8, 8)),
    "own attention": (lambda x: attention(KEYS, x, x.sin(), SEEN, x.cos()), (2, 3, 8, 8)),
    "linear": (lambda x: F.linear(x, MATRIX, BIAS).tanh(), (5, 8)),
    "conv2d": (lambda x: F.conv2d(x, KERNEL, padding=1).sigmoid(), (2, 8, 5, 5)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0).cos(), (2, 8, 3, 3)),
    "shapes": (lambda x: torch.cat(x.view(5, 2, 4).unbind(1)[::-1] + (x[:, 1:2] * x[:, 2:6],)), (5, 8)),
    "arithmetic": (lambda x: (1 - x) / (2 + x * x) - x**3 + (x.exp() + 1).sqrt() + (x * x + 1).rsqrt(), (5, 8)),
    "addcmul": (lambda x: torch.addcmul(x, x.sin(), 1 + x, value=0.5), (5, 8)),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x.square()), (5, 8)),
}


@pytest.mark.parametrize("how", ["dual", "func"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_derivatives_and_their_gradients(name, how):
    """Among them those of the layer norm, which PyTorch's own forward mode has wrong."""
    fn, shape = FUNCTIONS[name]
    x, dx, along = normal(*shape).requires_grad_(), normal(*shape), normal(*shape)
    value, derivative = exact_jvp(fn, (x,), (dx,), how)
    torch.testing.assert_close(value, fn(x), rtol=1e-12, atol=1e-12)
    weight, h = normal(*derivative.shape), 1e-4
    gradient = (torch.autograd.grad((derivative * weight).sum(), x)[0] * along).sum()
    with torch.no_grad():

        def difference(x):
            return (fn(x + h * dx) - fn(x - h * dx)) / (2 * h)

        torch.testing.assert_close(derivative, difference(x), rtol=1e-5, atol=1e-5)
        expected = ((difference(x + h * along) - difference(x - h * along)) * weight).sum() / (2 * h)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_dual_numbers_know_what_they_do_not_know():
    x = torch.ones(3)
    with pytest.raises(NoRule, match="no derivative of erfinv"):
        dual_jvp(lambda x: torch.erfinv(x / 2), (x,), (x,))
    with pytest.raises(NoRule, match="no derivative of Tensor.cumprod"):
        dual_jvp(lambda x: x.cumprod(0), (x,), (x,))

    class Fused(torch.autograd.Function):  # whose backward dual numbers would never reach
        @staticmethod
        def forward(ctx, x):
            return x * x

    with pytest.raises(NoRule, match="runs without gradient"):
        dual_jvp(Fused.apply, (x,), (x,))
    with torch.no_grad():
        assert torch.equal(dual_jvp(Fused.apply, (x,), (x,))[1], 2 * x)
    value, derivative = dual_jvp(lambda _: x, (x,), (x,))  # no dependence
    assert value is x and torch.equal(derivative, torch.zeros(3))
    dropped = dual_jvp(lambda x: F.dropout(x, 0.5), (torch.ones(64),), (torch.ones(64),))
    assert torch.equal(*dropped) and set(dropped[0].tolist()) == {0.0, 2.0}  # one mask for both
    assert len(Dual(x, x)) == 3


def two_times(seed=0):
    torch.manual_seed(seed)
    network = DiT(hidden_size=16, num_layers=2, num_heads=2, patch_size=4)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return wrap(network.double(), Linear(), "flow_prediction")


def test_ways_agree_on_the_reference_network():
    """The Lagrangian residual and all of its gradients."""
    student = two_times()
    x, s = normal(3, 1, 8, 8), torch.tensor([0.1, 0.3, 0.5], dtype=F64)
    condition = student.encode(None, class_labels=[1, 2, 3])

    def u(*at):
        return student.average_velocity(*at, condition)

    made = {}
    for how in ("auto", "dual", "func", "finite_difference"):
        r = lagrangian(
            u, lambda x, t: u(x, t, t), x, s + 0.4, s, jvp=how, step=1e-4, network=student.module
        )  # fmt: skip
        made[how] = (r, *torch.autograd.grad(r.square().sum(), list(student.module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(made["auto"], made["dual"], strict=True))
    for how, tolerance in (("func", 1e-11), ("finite_difference", 1e-5)):
        for a, b in zip(made[how], made["dual"], strict=True):
            assert (a - b).norm() <= tolerance * max(b.norm(), 1e-3)


@pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux", "dit"))
def test_dual_numbers_go_through_diffusers_networks(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    denoiser = from_pipeline(pipe)
    inputs = dict(class_labels=[1, 7]) if name == "dit" else dict(prompt=["a cat", "two dogs"])
    condition = denoiser.encode(pipe, **inputs)
    flow = TwoTime(denoiser)
    flow.network.double()
    nn.init.normal_(flow.network.gap_embedder.out.weight)
    x, t = normal(2, 4, 16, 16), torch.tensor([0.9, 0.6], dtype=F64)

    def jump(s):
        return flow_map(lambda *at: flow.average_velocity(*at, condition), x, t, s)

    s = t * 0.3
    weights = [p for p in flow.network.parameters() if p.requires_grad]
    made = []
    for how in ("dual", "func"):
        _, derivative = directional_derivative(jump, (s,), (torch.ones_like(s),), how, 0, flow.network)
        gradients = torch.autograd.grad(derivative.square().sum(), weights, allow_unused=True)
        made.append((derivative, gradients))
    (a, of_a), (b, of_b) = made
    assert b.abs().max() > 1e-3
    rtol = 1e-4 if name == "flux" else 1e-10  # Diffusers rotates Flux's queries and keys in float32
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    largest = max(g.norm() for g in of_b if g is not None)
    for p, q in zip(of_a, of_b, strict=True):
        p, q = (torch.zeros(()) if g is None else g for g in (p, q))
        assert (p - q).norm() <= rtol * largest


FUNCTIONS_OF_KERNELS = ("forward", "tangent", "forward_with_tangent", "backward", "backward_with_tangent")


def derive(student, how, fn=None):
    x, t = torch.linspace(-1, 1, 64, dtype=F64).view(1, 1, 8, 8), torch.tensor([0.5], dtype=F64)

    def jump(s):
        return (fn or (lambda y: y))(student.average_velocity(x, t, s))

    s = torch.tensor([0.2], dtype=F64)
    return directional_derivative(jump, (s,), (torch.ones_like(s),), how, 1e-4, student.module)[1]


def test_auto_takes_what_there_is_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, "genkit.training")
    student = two_times()
    for _ in range(2):
        exact = derive(student, "auto")
    assert [r.getMessage() for r in caplog.records] == ["jvp=auto differentiates by dual; attention is eager"]
    assert exact.abs().max() > 0
    for how, prepare, message in (
        ("func", lambda s: torch.special.erfcx, "by func: no derivative of special_erfcx"),
        ("finite_difference", quantise, "by finite_difference: the weight .* is quantised or in shards"),
        (
            "finite_difference",
            lambda s: checkpointed(s) or torch.special.erfcx,
            "special_erfcx.*; gradient checkpointing",
        ),
    ):
        student = two_times()
        fn = prepare(student)
        caplog.clear()
        for _ in range(2):
            got = derive(student, "auto", fn)
        (record,) = caplog.records
        assert record.getMessage().startswith("jvp=auto differentiates by")
        assert re.search(message, record.getMessage()), record.getMessage()
        assert got.isfinite().all() and how in record.getMessage()


def checkpointed(student):
    student.network.enable_gradient_checkpointing()


def quantise(student):
    layer = student.network.blocks[0].fc1
    weight = layer.weight.detach()
    del layer.weight
    layer.register_parameter("weight", nn.Parameter((weight * 100).to(torch.int8), requires_grad=False))
    layer.forward = lambda x: F.linear(x, layer.weight.to(x.dtype) / 100, layer.bias)


class XFormersAttnProcessor(nn.Module):
    pass


class FlashProcessor(nn.Module):
    _attention_backend = "flash"


class OwnProcessor(nn.Module):
    _attention_backend = "genkit"


def attends_by(processor):
    def change(student):
        student.network.blocks[0].processor = processor()

    return change


def compiled(student):
    student.network.blocks[0].compile()


@pytest.mark.parametrize(
    "change, hows, message",
    [
        (compiled, ("dual", "func"), "Block is compiled; give the network as it was before torch.compile"),
        (quantise, ("dual", "func"), "quantised or in shards \\(torch.int8\\)"),
        (attends_by(XFormersAttnProcessor), ("dual", "func"), "disable_xformers_memory_efficient_attention"),
        (attends_by(FlashProcessor), ("dual", "func"), r"runs on flash.*set_attention_backend\('native'\)"),
        (checkpointed, ("func",), "gradient checkpointing of DiT is on.*switch it off"),
    ],
)
def test_what_has_no_forward_mode_is_refused_with_the_remedy(change, hows, message):
    student = two_times()
    change(student)
    for how in hows:
        with pytest.raises(ValueError, match=f"jvp='{how}': .*{message}.*or set objective.jvp=finite_difference"):
            derive(student, how)
    assert derive(student, "auto").isfinite().all()
    if change is checkpointed:
        assert obstacle(student.module, "dual") is None
        assert torch.equal(derive(student, "dual"), derive(two_times(), "dual"))


def test_own_attention_and_that_of_pytorch_are_accepted():
    student = two_times()
    expected = derive(student, "dual")
    attends_by(OwnProcessor)(student)
    for how in ("dual", "func"):
        torch.testing.assert_close(derive(student, how), expected, rtol=1e-11, atol=1e-11)


def test_attention_that_is_called_inside_of_pytorch_has_forward_mode():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x, dx = normal(2, 5, 8), normal(2, 5, 8)
    _, derivative = exact_jvp(lambda x: layer(x, x, x, need_weights=False)[0], (x,), (dx,), "func")
    h = 1e-5
    ahead, behind = (layer(y, y, y, need_weights=False)[0] for y in (x + h * dx, x - h * dx))
    torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("how", ["dual", "func"])
def test_derivatives_take_the_kernels_where_there_are_some(how, monkeypatch):
    """With the kernels' formulas in their place."""
    kernels_that_run()
    called = []

    def attend(name):
        def run(*arguments):
            called.append(name)
            return getattr(closed_form, name)(*arguments)

        return run

    monkeypatch.setattr(autograd, "_triton", lambda: SimpleNamespace(**{n: attend(n) for n in FUNCTIONS_OF_KERNELS}))
    fn, shape = lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()), (2, 3, 5, 16)
    x, dx = normal(*shape).float().requires_grad_(), normal(*shape).float()
    made = []
    for which in ("off", "on"):
        with kernels.choose(which):
            _, derivative = exact_jvp(fn, (x,), (dx,), how)
            made.append((derivative, torch.autograd.grad(derivative.square().sum(), x)[0]))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    forward = ["forward_with_tangent"] if how == "dual" else ["forward", "tangent"]
    assert called == [*forward, "backward_with_tangent"]


def test_a_function_without_rule_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="jvp='dual': no derivative of special_erfcx .*; use func, or set"):
        derive(two_times(), "dual", torch.special.erfcx)
