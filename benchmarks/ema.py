"""What it costs to average the weights of DiT-B/2 (130 million), beside loops over the tensors.

One thread, the candidates taking turns. ``mul_, add_`` moves an average in place in two passes, ``Diffusers`` is its
EMAModel as it comes. The speed of copying the averages tells what the memory allows: what moves an average reads it,
reads the weight and writes, 12 bytes; ``mul_, add_`` moves 20. Where memory is the limit, which it is on CPUs, no code
is more than 5/3 as fast as the latter; launches, of which a GPU is spared two a tensor, count in benchmarks/gpu.

Bounds: float32 weights at least three times as fast as Diffusers' loop and 1.3 times as ``mul_, add_``, with not more
than 1.5 times the time that memory allows; bfloat16 weights not slower than the latter loop.

    python benchmarks/ema.py --check
"""

from collections.abc import Callable, Sequence

import diffusers
import torch
from _common import paired, ratio, report
from torch import Tensor

from genkit.networks.dit import DiT
from genkit.training.ema import EMA

DECAY, ROUNDS = 0.9999, 9


def loop(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        average.mul_(DECAY).add_(weight, alpha=1 - DECAY)


def main() -> None:
    rows, bounds = [], {}
    with torch.device("meta"):
        network = DiT(sample_size=32, in_channels=4, hidden_size=768, num_layers=12, num_heads=12)
    for dtype, decays in ((torch.float32, [DECAY]), (torch.float32, [DECAY, 0.999, 0.99]), (torch.bfloat16, [DECAY])):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(p.shape, generator=generator).to(dtype) for p in network.parameters()]
        ema = EMA({str(i): w for i, w in enumerate(weights)}, decays)
        averages = [w.to(torch.float32, copy=True) for w in weights]
        elsewhere = [torch.empty_like(a) for a in averages]
        candidates: dict[str, Callable[[], object]] = {
            "genkit": ema.update,
            "mul_, add_": lambda a=averages, w=weights, ds=decays: [loop(a, w) for _ in ds],
            "copy": lambda a=averages, e=elsewhere: torch._foreach_copy_(e, a),
        }
        if dtype == torch.float32 and len(decays) == 1:
            trained = [torch.nn.Parameter(w) for w in weights]  # others it would copy
            theirs = diffusers.training_utils.EMAModel(trained, decay=DECAY)
            candidates["Diffusers"] = lambda theirs=theirs, w=trained: theirs.step(w)
        times = paired(candidates, rounds=ROUNDS)
        kind = f"{str(dtype).removeprefix('torch.')}, averages: {len(decays)}"
        row = {"weights": kind} | {f"{name}, ms": 1e3 * min(s) for name, s in times.items() if name != "Diffusers"}
        row["Diffusers, ms"] = 1e3 * min(times["Diffusers"]) if "Diffusers" in times else ""
        rows.append(row)
        bounds[f"{kind}: time over mul_, add_"] = (
            ratio(times, "genkit", "mul_, add_"),
            1 / 1.3 if dtype == torch.float32 else 1.0,
        )
        if "Diffusers" in times:
            bounds[f"{kind}: time over Diffusers' EMAModel"] = (ratio(times, "genkit", "Diffusers"), 1 / 3)
            # A copy moves 12 bytes, too: what it writes is read into the cache before.
            bounds[f"{kind}: time over a copy"] = (ratio(times, "genkit", "copy"), 1.5)
    report("ema", rows, bounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
