"""Memory is linear in tokens: what is kept for the backward, and what is made on the way."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from genkit.attention import attention, attention_with_tangent
from genkit.kernels import choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, CHANNELS = 2, 16


def value(x):
    return attention(*x[:3])


def through_jvp(x):
    return torch.func.jvp(attention, tuple(x[:3]), tuple(x[3:]))


def pair(x):
    return attention_with_tangent(*x)


def kept(fn, tokens, mode, dtype):
    """Bytes of what autograd keeps while outputs live, each storage once, inputs not."""
    x = [torch.randn(1, HEADS, tokens, CHANNELS, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(6)]
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with choose(mode), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = fn(x)
    del outputs
    return sum(storages.values()) - sum(storages.get(y.untyped_storage()._cdata, 0) for y in x)


# Rows of CHANNELS numbers, in the inputs' dtype and in float32, and single numbers in float32, of a token in a head.
@pytest.mark.parametrize(
    "fn, own, exact, numbers",
    [
        (value, 1, 0, 1),  # o; lse
        (pair, 0, 2, 2),  # o and to in float32; lse and mu
        (through_jvp, 1, 2, 2),  # both
    ],
)
def test_what_is_kept_for_the_backward_is_linear(fn, own, exact, numbers):
    for tokens in (32, 64):
        token = CHANNELS * (2 * own + 4 * exact) + 4 * numbers
        assert kept(fn, tokens, "on", torch.float16) == HEADS * tokens * token
    eager = [kept(fn, tokens, "off", torch.float16) for tokens in (64, 128)]
    assert eager[1] > 3 * eager[0]


@pytest.fixture
def counted(monkeypatch):
    """``benchmarks/attention_memory.py``: kernels that allocate what they allocate, and compute nothing."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "gpu")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import attention_memory

    return attention_memory


def test_a_step_through_value_tangent_and_all_gradients_is_linear(counted):
    fused, eager = ([counted.of_attention(n, eager) for n in (1024, 2048)] for eager in (False, True))
    assert fused[1] == pytest.approx(2 * fused[0], rel=1e-3) and eager[1] > 3.9 * eager[0]
    assert fused[0] < eager[0] / 4


def test_a_step_of_a_network_is_counted_as_the_benchmark_says(counted, monkeypatch):
    """Less for each sample by fused attention than by math attention, where the derivative is backpropagated."""
    from genkit.networks.dit import DiT

    with torch.device("meta"):
        model = DiT(sample_size=64, in_channels=4, hidden_size=144, num_layers=2, num_heads=2).to(torch.bfloat16)
    used = {way: [counted.of_step(model, "lsd", way, n) for n in (1, 2)] for way in ("dual", "func", "math")}
    for way in ("dual", "func"):
        assert used[way][1] - used[way][0] < (used["math"][1] - used["math"][0]) / 3, used
