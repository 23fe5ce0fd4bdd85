"""Step time of genkit's training loop against a bare PyTorch loop.

Both train the same DiT on digits with the same flow-matching loss, AdamW, gradient clipping, learning-rate schedule and
float32 average of the weights. Blocks of steps alternate, so that a change of the machine's speed meets both; the ratio
is the median over pairs of neighbouring blocks. Bound (``--check``): ratio at most 1.05.

    python benchmarks/training_overhead.py --check
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import diffusers
import torch
from diffusers.optimization import get_scheduler
from torch.nn import functional as F

import genkit
from genkit.data.digits import Digits
from genkit.networks.dit import DiT
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.trainer import Trainer

BOUND = 1.05
MODEL = dict(patch_size=4, hidden_size=160, num_layers=4, num_heads=4, mlp_ratio=3.0)  # that of the demo
BATCH, STEPS, LR, CLIP, DECAY = 128, 10**6, 1e-3, 10.0, 0.995


def bare(device: torch.device) -> Iterator[None]:
    """The loop that one would write for this one case."""
    torch.manual_seed(0)
    source = Digits()
    images, labels = source.images.to(device), source.labels.to(device)
    network = DiT(**MODEL).to(device)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=STEPS)
    while True:
        order = torch.randperm(len(images), device=device)
        for i in range(0, len(order) - BATCH + 1, BATCH):
            index = order[i : i + BATCH]
            x0, c = images[index], labels[index]
            c = torch.where(torch.rand(BATCH, device=device) < 0.1, 10, c)
            t, eps = torch.rand(BATCH, device=device), torch.randn_like(x0)
            x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
            loss = F.mse_loss(network(x, t, None, c), eps - x0, reduction="sum") / BATCH
            if not torch.isfinite(loss):
                raise RuntimeError("the loss is not finite")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - DECAY)
            yield


def ours(folder: str) -> Iterator[None]:
    """The same recipe in genkit's loop, with its log, item-wise randomness and every alarm on."""
    config = TrainConfig(
        output_dir=folder,
        model=dict(network="dit", **MODEL),
        objective=dict(name="flow_matching", condition_dropout=0.1),
        data=dict(name="digits"),
        optimizer=dict(name="AdamW", lr=LR),
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        global_batch_size=BATCH,
        max_train_steps=STEPS,
        checkpointing_steps=STEPS,
        max_grad_norm=CLIP,
        ema=dict(decays=[DECAY]),
    ).check()
    trainer = Trainer(build(config), quiet=True)
    yield from trainer.steps()


def timed(loop: Iterator[None], steps: int, device: torch.device) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        next(loop)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if the ratio is above {BOUND}")
    parser.add_argument("--blocks", type=int, default=24, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        loops = {"bare": bare(device), "genkit": ours(folder)}
        for loop in loops.values():
            timed(loop, arguments.steps, device)  # warm-up
        times: dict[str, list[float]] = {name: [] for name in loops}
        for i in range(arguments.blocks):
            for name in sorted(loops, reverse=bool(i % 2)):
                times[name].append(timed(loops[name], arguments.steps, device))
    ratio = median(g / b for g, b in zip(times["genkit"], times["bare"], strict=True))
    result = {
        "milliseconds_per_step": {name: round(1000 * median(values), 3) for name, values in times.items()},
        "fastest_milliseconds_per_step": {name: round(1000 * min(values), 3) for name, values in times.items()},
        "ratio": round(ratio, 4),
        "bound": BOUND,
        "blocks": arguments.blocks,
        "steps_per_block": arguments.steps,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"genkit": genkit.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    path = Path(__file__).parent / "results" / "training_overhead.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{'loop':<8} {'median ms/step':>15} {'fastest ms/step':>16}")
    for name in loops:
        slow, fast = (result[key][name] for key in ("milliseconds_per_step", "fastest_milliseconds_per_step"))
        print(f"{name:<8} {slow:>15.2f} {fast:>16.2f}")
    print(f"ratio {ratio:.3f} (bound {BOUND})")
    return int(arguments.check and ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
