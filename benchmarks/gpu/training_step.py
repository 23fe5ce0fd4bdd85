"""A MeanFlow and an LSD step of DiT-XL/2-sized blocks, by fused attention and by PyTorch's math attention.

A step is the derivative of the network along a direction (LSD backpropagates through it, MeanFlow does not), a loss and
its gradients, in bfloat16, at 1,024 tokens. Bounds: there is a batch that fits with fused attention and not with
math attention, under which the derivative cannot be taken by any other of PyTorch's kernels; and at the largest batch
that fits with both, fused attention makes the step at least 2 times faster.

    python benchmarks/gpu/training_step.py
    python benchmarks/gpu/training_step.py --device cpu    the script itself, on a tiny network
"""

import sys
from collections.abc import Callable, Iterator

import torch
from _measure import Row, main, peak_bytes, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.networks.dit import DiT
from genkit.training.parts.forward_mode import exact_jvp

FASTER = 2.0
LOSSES = ("mean_flow", "lsd")


def network(device: str) -> DiT:
    """Two-time DiT; on a GPU with DiT-XL/2's 28 blocks of width 1152 and 16 heads at 32 x 32 tokens."""
    torch.manual_seed(0)
    size: dict = dict(hidden_size=1152, num_layers=28, num_heads=16) if device != "cpu" else dict(num_layers=2)
    made = DiT(sample_size=64 if device != "cpu" else 8, in_channels=4, **size)
    for weight in made.parameters():  # those that start at zero would leave attention without gradient
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return made.to(device, torch.bfloat16 if device != "cpu" else torch.float32)


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
    generator = torch.Generator(device).manual_seed(0)
    size = model.config.sample_size
    x, v = torch.randn(2, batch, 4, size, size, device=device, generator=generator)
    t = torch.rand(batch, device=device, generator=generator) * 0.5 + 0.5
    s = t - 0.3
    gap = (s - t)[:, None, None, None]
    derive = WAYS[way]

    def run() -> None:
        if loss == "mean_flow":
            with torch.no_grad():
                _, along = derive(lambda x_, t_: model(x_, t_, s).float(), (x, t), (v, torch.ones_like(t)))
                target = v + gap * along
            residual = model(x, t, s).float() - target
        else:
            end, speed = derive(
                lambda s_: x + (s_ - t)[:, None, None, None] * model(x, t, s_), (s,), (torch.ones_like(s),)
            )
            with torch.no_grad():
                target = model(end.detach(), s, s).float()
            residual = speed - target
        residual.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def fits(run: Callable[[], None]) -> bool:
    try:
        run()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def largest(model: DiT, loss: str, way: str, device: str, limit: int = 256) -> int:
    """The largest power of two that fits, up to ``limit``; 0 where one sample does not."""
    batch = 0
    while 2 * max(batch, 0.5) <= limit and fits(step(model, loss, int(2 * max(batch, 0.5)), way, device)):
        batch = int(2 * max(batch, 0.5))
        model.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return batch


def rows(device: str) -> Iterator[Row]:
    model = network(device)
    cuda = device.startswith("cuda")
    for loss in LOSSES:
        sizes = {way: largest(model, loss, way, device) if cuda else 2 for way in WAYS}
        for way, size in sizes.items():
            yield Row(f"{loss}: largest batch, {way}", size, "samples")
        ours = max(sizes["func"], sizes["dual"])
        if cuda:
            yield Row(f"{loss}: largest batch over that of math attention", ours / max(sizes["math"], 0.5), "x", 2.0)
        batch = min(sizes.values())
        if not batch:
            continue
        taken = {way: seconds(step(model, loss, batch, way, device), device, budget=3.0) for way in WAYS}
        for way in WAYS:
            used = peak_bytes(step(model, loss, batch, way, device), device) / 2**30
            yield Row(f"{loss}: step of {batch}, {way}", taken[way] * 1e3, "ms", note=f"{used:.2f} GiB")
        for way in ("func", "dual"):
            bound = FASTER if cuda and way == "dual" else None
            yield Row(f"{loss}: {way} faster than math attention", taken["math"] / taken[way], "x", bound)


if __name__ == "__main__":
    sys.exit(main("training_step", __doc__.splitlines()[0], rows))
