"""MeanFlow and LSD steps of DiT-XL/2-sized blocks, by fused attention and by PyTorch's math attention.

A step is the derivative of the network along a direction, a loss and its gradients, in bfloat16, at 1,024 tokens. LSD
backpropagates through the derivative. MeanFlow does not, and takes it in a pass of its own, as our trainer does, or
together with the value (``one pass``), as the paper's listing does. Math attention is the only one of PyTorch's through
which the derivative can be taken; the other passes take PyTorch's fastest.

Bounds: of LSD there is a batch that fits with fused attention and not with math attention; and at a batch that fits
with both, every step is at least 2 times faster by dual numbers. Batches follow from memory as counted by
``benchmarks/attention_memory.py``, which is printed beside what is measured.

    python benchmarks/gpu/training_step.py
    python benchmarks/gpu/training_step.py --device cpu    the script itself, on a tiny network
"""

import json
import sys
from collections.abc import Callable, Iterator

import torch
from _measure import RESULTS, Row, main, peak_bytes, seconds, sections
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.networks.dit import DiT
from genkit.training.parts.forward_mode import exact_jvp

FASTER = 2.0
LOSSES = ("mean_flow", "mean_flow, one pass", "lsd")


def network(device: str) -> DiT:
    """Two-time DiT; but on a CPU with DiT-XL/2's 28 blocks of width 1152 and 16 heads at 32 x 32 tokens."""
    torch.manual_seed(0)
    size: dict = dict(hidden_size=1152, num_layers=28, num_heads=16) if device != "cpu" else dict(num_layers=2)
    with torch.device(device):
        made = DiT(sample_size=64 if device != "cpu" else 8, in_channels=4, **size)
    if device != "meta":
        for weight in made.parameters():  # those that start at zero would leave attention without gradient
            if weight.ndim > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=0.02)
    return made.to(torch.bfloat16 if device != "cpu" else torch.float32)


def math_jvp(fn: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """What users have without this toolkit."""
    with sdpa_kernel(SDPBackend.MATH):
        moved = torch.func.jvp(fn, primals, tangents)
        return moved[0], moved[1]


WAYS: dict[str, Callable] = {
    "math": math_jvp,
    "func": lambda *a: exact_jvp(*a, "func"),
    "dual": lambda *a: exact_jvp(*a, "dual"),
}


def step(model: DiT, loss: str, batch: int, way: str, device: str) -> Callable[[], None]:
    """A training step of ``batch`` samples, but for the optimiser."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.sample_size
    x, v = (torch.randn(batch, 4, size, size, generator=generator).to(device) for _ in range(2))
    t = (torch.rand(batch, generator=generator) * 0.5 + 0.5).to(device)
    s = t - 0.3
    gap = (s - t)[:, None, None, None]
    derive = WAYS[way]

    def u(x_: Tensor, t_: Tensor) -> Tensor:
        return model(x_, t_, s).float()

    def run() -> None:
        if loss == "lsd":
            end, speed = derive(
                lambda s_: x + (s_ - t)[:, None, None, None] * model(x, t, s_), (s,), (torch.ones_like(s),)
            )
            with torch.no_grad():
                target = model(end.detach(), s, s).float()
            residual = speed - target
        elif loss == "mean_flow":
            with torch.no_grad():
                _, along = derive(u, (x, t), (v, torch.ones_like(t)))
            residual = u(x, t) - gap * along - v
        else:
            value, along = derive(u, (x, t), (v, torch.ones_like(t)))
            along = along.detach()
            residual = value - gap * along - v
        residual.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def fits(run: Callable[[], None]) -> bool:
    try:
        run()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def counted(loss: str) -> dict[str, Callable[[float], float]]:
    """For each way the GiB beside the weights that a batch takes, by what was counted."""
    rows = json.loads((RESULTS / "attention_memory.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["step"] == loss]
    return {row["attention"]: lambda n, r=row: r["GiB of any batch"] + n * r["GiB a sample"] for row in rows}


def steps(model: DiT, loss: str, device: str) -> Iterator[Row]:
    cuda, needs = device.startswith("cuda"), counted(loss)
    both, ours = 2, 0
    if cuda:
        room = 0.85 * torch.cuda.mem_get_info()[0] / 2**30  # the rest is for fragments, and for what libraries keep
        both = max(n for n in (1, 2, 4, 8, 16) if n == 1 or max(need(n) for need in needs.values()) < room)
        ours = max(n for n in range(1, 129) if n == 1 or needs["dual"](n) < room)
    taken = {}
    for way, need in needs.items():
        run = step(model, loss, both, way, device)
        taken[way] = seconds(run, device, budget=1.5)
        used = f"{peak_bytes(run, device) / 2**30:.2f} GiB, counted {need(both):.2f}" if cuda else ""
        yield Row(f"{loss}: step of {both}, {way}", taken[way] * 1e3, "ms", note=used)
    for way in ("func", "dual"):
        bound = FASTER if cuda and way == "dual" else None
        yield Row(f"{loss}: {way} faster than math attention", taken["math"] / taken[way], "x", bound)
    if cuda and needs["math"](ours) > 1.15 * room / 0.85:
        run = step(model, loss, ours, "dual", device)
        fitted = fits(run)
        used = f"{peak_bytes(run, device) / 2**30:.2f} GiB, counted {needs['dual'](ours):.2f}" if fitted else ""
        yield Row(f"{loss}: {ours} samples fit with fused attention", float(fitted), "", 1.0, note=used)
        torch.cuda.empty_cache()
        fitted = fits(step(model, loss, ours, "math", device))
        used = f"counted {needs['math'](ours):.0f} GiB"
        yield Row(f"{loss}: {ours} samples fit with math attention", float(fitted), "", 0.0, False, note=used)


def rows(device: str) -> Iterator[Row]:
    model = network(device)
    return sections((loss, lambda loss=loss: steps(model, loss, device)) for loss in reversed(LOSSES))


if __name__ == "__main__":
    sys.exit(main("training_step", __doc__.splitlines()[0], rows))
