"""Nearest codes, averages of weights and guidance on a GPU: fused, eager, and what users have without this toolkit.

Bounds: at 262,144 codes at least 5 times faster than torch.cdist and its argmin, with less than an eighth of the
memory that a matrix of scores takes, and the same codes as the eager search; averages of 130 million weights at least
3 times faster than a loop of mul_ and add_ over the tensors; compiled guidance within 1e-5 of eager.

    python benchmarks/gpu/fused.py
    python benchmarks/gpu/fused.py --device cpu    the script itself, interpreted, on tiny inputs
"""

import os
import sys

if any(argument.endswith("cpu") for argument in sys.argv):  # decided when kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

import time
from collections.abc import Callable, Iterator

import torch
from _measure import Row, main, peak_bytes, seconds, sections

from genkit import kernels
from genkit.denoisers.base import Prediction
from genkit.guidance import APG
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.quantizers.search import nearest_codes
from genkit.training.ema import EMA

SEARCHES = [(16_384, 8192, 8), (16_384, 8192, 256), (262_144, 8192, 8), (262_144, 8192, 64), (262_144, 8192, 256)]
FASTER, AVERAGED_FASTER, MEMORY = 5.0, 3.0, 1 / 8
DECAY = 0.9999


def chosen(how: kernels.Mode, run: Callable) -> Callable:
    """``run`` under eager code (``off``) or kernels (``on``)."""

    def chosen_run():
        with kernels.choose(how):
            return run()

    return chosen_run


def searches(k: int, n: int, d: int, device: str) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    codebook = torch.randn(k, d, device=device, generator=generator)
    z = torch.randn(n, d, device=device, generator=generator)
    name, real = f"nearest of {k} codes, D = {d}, N = {n}", device != "cpu"
    fused, eager = (chosen(how, lambda: nearest_codes(z, codebook)) for how in ("on", "off"))
    ours, theirs = seconds(fused, device), seconds(lambda: torch.cdist(z, codebook).argmin(1), device)
    yield Row(f"{name}: fused", 1e3 * ours, "ms", note=f"{2 * n * k * d / ours / 1e12:.0f} TFLOP/s of products")
    yield Row(f"{name}: eager", 1e3 * seconds(eager, device), "ms")
    yield Row(f"{name}: cdist over fused", theirs / ours, "x", FASTER if real and k >= 2**18 else None)
    share = peak_bytes(fused, device) / (4 * n * k)
    yield Row(f"{name}: memory over a score matrix", share, "", MEMORY if real and k >= 2**18 else None, False)
    yield Row(f"{name}: codes other than eager's", float((fused() != eager()).sum()), "", 0.0, False)


def averages(dtype: torch.dtype, device: str) -> Iterator[Row]:
    size = dict(hidden_size=768, num_layers=12, num_heads=12) if device != "cpu" else dict(num_layers=2)
    with torch.device("meta"):
        shapes = [p.shape for p in DiT(sample_size=32, in_channels=4, **size).parameters()]
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    number = sum(w.numel() for w in weights)
    averages = [w.to(torch.float32, copy=True) for w in weights]
    ema = EMA({str(i): w for i, w in enumerate(weights)}, [DECAY])

    def loop():
        for average, weight in zip(averages, weights, strict=True):
            average.mul_(DECAY).add_(weight, alpha=1 - DECAY)

    name = f"average of {number / 1e6:.0f} M {str(dtype).removeprefix('torch.')} in {len(weights)} tensors"
    ours = seconds(chosen("on", ema.update), device)
    moved = number * (8 + dtype.itemsize) / ours / 1e9
    yield Row(f"{name}: fused", 1e3 * ours, "ms", note=f"{moved:.0f} GB/s")
    bound = AVERAGED_FASTER if device != "cpu" else None
    yield Row(f"{name}: loop over fused", seconds(loop, device) / ours, "x", bound)
    yield Row(f"{name}: eager", 1e3 * seconds(chosen("off", ema.update), device), "ms")


def guidance(device: str) -> Iterator[Row]:
    """APG at 1024 x 1024 pixels of Flux; the network beside it takes a hundred ms or more."""
    t = torch.tensor(0.6, dtype=torch.float64)
    z, cond, uncond = torch.randn(3, 1, 16, 128, 128, device=device)
    parts = {n: Prediction(raw, "flow_prediction", Linear(), z, t) for n, raw in (("cond", cond), ("uncond", uncond))}
    guider = APG(guidance_scale=5.0)
    eager, compiled = (
        chosen(how, torch.no_grad()(lambda: guider.combine(parts, None)[0].raw)) for how in ("off", "on")
    )
    start = time.perf_counter()
    off = float((compiled() - eager()).abs().max() / eager().abs().max())
    yield Row("APG compiled for the first time", time.perf_counter() - start, "s")
    yield Row("APG, compiled against eager", off, "", 1e-5, False)
    for name, run in (("eager", eager), ("compiled", compiled)):
        yield Row(f"APG at an evaluation, {name}", 1e6 * seconds(run, device), "us")


def rows(device: str) -> Iterator[Row]:
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = []
    for k, n, d in SEARCHES if device != "cpu" else [(300, 70, 8), (300, 70, 64)]:
        parts.append((f"nearest of {k} codes, D = {d}", lambda k=k, n=n, d=d: searches(k, n, d, device)))  # type: ignore
    for dtype in (torch.float32, torch.bfloat16):
        parts.append((f"average of {dtype}", lambda dtype=dtype: averages(dtype, device)))  # type: ignore[misc]
    parts.append(("guidance", lambda: guidance(device)))
    return sections(parts)


if __name__ == "__main__":
    sys.exit(main("fused", __doc__.splitlines()[0], rows))
