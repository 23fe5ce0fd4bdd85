"""What it costs to find the nearest code, beside torch.cdist and vector-quantize-pytorch.

Vectors and codes are normal. Seconds are of one CPU thread, the candidates taking turns (for GPUs see
benchmarks/gpu/fused.py). The peak is that of a process of its own, beyond its imports, the codebook included. The other
library's is the forward of its quantizer in eval mode. At 256 channels the product of the matrices is most of the work,
of torch.cdist too; ours is quicker there on CPUs that multiply bfloat16, whose answers are then made sure of.

Bounds: at 262,144 codes at least twice as fast as either, with a peak below 1 GB; ours equal to float64's.

    python benchmarks/nearest_code.py --check
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from _common import paired, ratio, report
from torch import Tensor

from genkit.quantizers.search import nearest_codes

try:
    from vector_quantize_pytorch import VectorQuantize
except ImportError:  # the table then lacks its column
    VectorQuantize = None

CASES = [(16_384, 1024, 8), (16_384, 1024, 256), (262_144, 512, 8), (262_144, 512, 256)]  # K, N, D
ROUNDS, CHECKED = 3, 16

# In a process that imports nothing else. What getrusage tells would begin with that of the process that started it.
ALONE = """
import re, torch
from genkit.quantizers.search import nearest_codes
torch.set_num_threads(1)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
nearest_codes(torch.randn({n}, {d}), torch.randn({k}, {d}))
print(peak() - before)
"""


def peak(k: int, n: int, d: int) -> float:
    """GB of a process that searches, the codebook included but no imports."""
    script = ALONE.format(k=k, n=n, d=d)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1e9


def theirs(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """The other library's indices; its codebook is ours."""
    k, d = codebook.shape
    quantizer = VectorQuantize(dim=d, codebook_size=k).to(codebook.device).eval()
    quantizer._codebook.embed.data.copy_(codebook[None])

    def find(z: Tensor) -> Tensor:
        with torch.no_grad():
            return quantizer(z[None])[1][0]

    return find


def wrong(found: Tensor, z: Tensor, codebook: Tensor) -> float:
    """The share of some vectors whose code is not float64's."""
    exact = torch.stack([(row.double() - codebook.double()).square().sum(1).argmin() for row in z[:CHECKED]])
    return (found[:CHECKED] != exact).double().mean().item()


def main() -> None:
    rows, bounds = [], {}
    for k, n, d in CASES:
        generator = torch.Generator().manual_seed(0)
        codebook = torch.randn(k, d, generator=generator)
        z = torch.randn(n, d, generator=generator)
        finders: dict[str, Callable[[Tensor], Tensor]] = {
            "genkit": lambda z, codebook=codebook: nearest_codes(z, codebook),
            "cdist": lambda z, codebook=codebook: torch.cdist(z, codebook).argmin(1),
        }
        if VectorQuantize is not None:
            finders["vector-quantize-pytorch"] = theirs(codebook)
        times = paired({name: lambda f=f, z=z: f(z) for name, f in finders.items()}, rounds=ROUNDS, warmup=1)
        row: dict[str, Any] = {"K": k, "N": n, "D": d} | {f"{name}, s": min(s) for name, s in times.items()}
        for name in list(finders)[1:]:
            row[f"{name} over genkit"] = ratio(times, name, "genkit")
            if k == 262_144:
                bounds[f"K = {k}, D = {d}: time over {name}"] = (ratio(times, "genkit", name), 0.5)
        row["peak, GB"] = peak(k, n, d)
        row["wrong"] = wrong(finders["genkit"](z), z, codebook)
        rows.append(row)
        bounds[f"K = {k}, D = {d}: wrong codes"] = (row["wrong"], 0.0)
        bounds[f"K = {k}, D = {d}: peak, GB"] = (row["peak, GB"], 1.0)
    report("nearest_code", rows, bounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
