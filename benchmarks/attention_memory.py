"""Memory of training steps with tangents under fused and under math attention: counted, not measured.

Steps are those of ``benchmarks/gpu/training_step.py``, of DiT-XL/2-sized blocks in bfloat16 at 1,024 tokens. They run
on tensors without data, under kernels that allocate what they allocate and compute nothing, and every storage is
counted while it lives: what a GPU holds beside the weights, but for fragments and what libraries keep. PyTorch's
attention is flash attention in every pass that is not differentiated forward, and math attention where it is.

Under fused attention a step holds as much for each sample whatever their number; LSD at most a third of what it holds
under math attention; and value, tangent and all gradients of a layer's attention twice as much at twice the tokens.
MeanFlow's derivative in a pass of its own keeps nothing, so that math attention costs it time alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from _common import report
from _memory import Peak
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from genkit.attention import _triton_backward, _triton_forward, attention_with_tangent, autograd, functional

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import training_step

GIB, ROOM, HOPPER = 2**30, 78, 227 * 1024


def _made(q, k, v, bias, mask, lse, tangents, options, with_tangent, precise) -> tuple:
    more = (options, with_tangent, precise, None, HOPPER)
    return _triton_forward.launches(q, k, v, bias, mask, lse, *tangents, *more)[2]


def _forward(q, k, v, bias, mask, options):
    o, _, lse, *_ = _made(q, k, v, bias, mask, None, (None,) * 4, options, False, False)
    return o, lse


def _tangent(q, k, v, bias, mask, lse, tq, tk, tv, tbias, options, precise):
    _, to, _, mu, *exact = _made(q, k, v, bias, mask, lse, (tq, tk, tv, tbias), options, True, precise)
    return to, mu, *exact


def _pair(q, k, v, bias, mask, tq, tk, tv, tbias, options, precise):
    return _made(q, k, v, bias, mask, None, (tq, tk, tv, tbias), options, True, precise)


def _backward(q, k, v, bias, mask, o, lse, g, options, needs):
    inputs = (q, k, v, bias, mask, *(None,) * 4, o, None, lse, None, g, None, options, (*needs, *(False,) * 4))
    return _triton_backward.launches(*inputs)[1][:4]


ALLOCATING = SimpleNamespace(
    forward=_forward,
    tangent=_tangent,
    forward_with_tangent=_pair,
    backward=_backward,
    backward_with_tangent=lambda *inputs: _triton_backward.launches(*inputs)[1],
)


class FlashElsewhere(TorchFunctionMode):
    """PyTorch's plain attention as on a GPU, where nothing is differentiated forward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and not types and forward_ad._current_level < 0:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def fused() -> Iterator[None]:
    with (
        mock.patch.object(functional, "_fused", lambda inputs: True),
        mock.patch.object(autograd, "_triton", lambda: ALLOCATING),
    ):
        yield


def peak(run: Callable[[], object], without: tuple[Tensor, ...]) -> int:
    with Peak(without) as counting:
        run()
    return counting.alive.most


def of_step(model: training_step.DiT, loss: str, way: str, batch: int) -> int:
    run = training_step.step(model, loss, batch, way, "meta")
    with fused(), FlashElsewhere():
        return peak(run, (*model.parameters(), *model.buffers()))


def of_attention(tokens: int, eager: bool) -> int:
    """Value, tangent and all gradients of a layer."""
    leaves = [torch.empty(1, 16, tokens, 72, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(6)]

    def run():
        o, to = attention_with_tangent(*leaves, eager=eager)
        return torch.autograd.grad((o, to), leaves, (o.detach(), to.detach()))

    with fused():
        return peak(run, tuple(leaves))


def main() -> None:
    model = training_step.network("meta")
    rows, bounds, samples = [], {}, {}
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    for loss in training_step.LOSSES:
        for way in training_step.WAYS:
            few, more, most = (of_step(model, loss, way, batch) for batch in (4, 8, 16))
            sample = samples[loss, way] = (more - few) / 4
            rest = few - 4 * sample
            largest = int((ROOM * GIB - weights - rest) // sample)
            row = {"step": loss, "attention": way, "GiB a sample": sample / GIB, "GiB of any batch": rest / GIB}
            rows.append(row | {f"samples in {ROOM} GiB": largest})
            if way == "dual":
                bounds[f"{loss}: 16 samples over what 4 and 8 say"] = (most / (rest + 16 * sample), 1.01)
    bounds["lsd: a sample, fused over math attention"] = (samples["lsd", "dual"] / samples["lsd", "math"], 1 / 3)
    grows, eagerly = (of_attention(16384, eager) / of_attention(8192, eager) for eager in (False, True))
    bounds[f"a layer at 16,384 over 8,192 tokens, fused (eager: {eagerly:.2f})"] = (grows, 2.01)
    report("attention_memory", rows, bounds)


if __name__ == "__main__":
    main()
