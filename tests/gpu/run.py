"""The core on a GPU against the CPU: largest relative differences.

    python tests/gpu/run.py                 on the first CUDA device
    python tests/gpu/run.py --device cpu    the script itself, where there is none (compares the CPU with itself)

``benchmarks/gpu/run.py`` runs this, the tests of kernels, and all measurements.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

import diffusers
import torch
from _measure import Row, main, sections

from genkit.denoisers import TwoTime, from_pipeline
from genkit.guidance import APG, CFG
from genkit.guidance.hooks import guided
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps
from genkit.schedulers import FlowMapScheduler
from genkit.testing import tiny
from genkit.testing.oracles import eight_gaussians
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.parts.residuals import directional_derivative, flow_map
from genkit.training.trainer import Trainer


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).abs().max() / b.abs().max())


def randomness(device: str) -> float:
    a, b = (ItemRNG(0, range(512), d).normal((64,)) for d in (device, "cpu"))
    return difference(a, b)


def oracle_sampling(device: str) -> float:
    law, results = eight_gaussians(), []
    for d in (device, "cpu"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        set_timesteps(scheduler, 16, d)
        results.append(sample(law.denoiser(), scheduler, ItemRNG(0, range(256), d).normal((2,))))
    return difference(*results)


def guided_pipeline(name: str, guider) -> Callable[[str], float]:
    def check(device: str) -> float:
        images = []
        for d in (device, "cpu"):
            pipe = tiny.pipeline(name).to(d)
            pipe.set_progress_bar_config(disable=True)
            arguments = tiny.call_arguments(name) | {"guidance_scale": 5.0, "output_type": "pt"}
            arguments["generator"] = torch.Generator().manual_seed(0)  # on the CPU, so that both start from one noise
            with guided(pipe, guider):
                images.append(pipe(**arguments).images)
        return difference(*images)

    return check


def two_time_derivative(device: str) -> float:
    """du/ds by forward mode on the device against the CPU, on SD3's transformer."""
    results = []
    for d in (device, "cpu"):
        pipe = tiny.pipeline("sd3").to(d)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = TwoTime(from_pipeline(pipe))
            for weight in student.network.gap_embedder.parameters():
                weight.data = (0.3 * torch.randn(weight.shape)).to(d)
        condition = student.encode(pipe, prompt=["a", "b"], negative_prompt="")
        x = ItemRNG(0, range(2), d).normal((4, 16, 16))
        t, s = torch.full((2,), 0.8, device=d), torch.full((2,), 0.3, device=d)

        def jump(s_, student=student, x=x, t=t, condition=condition):
            return flow_map(lambda a, b, c: student.average_velocity(a, b, c, condition), x, t, s_)

        results.append(directional_derivative(jump, (s,), (torch.ones_like(s),), "func", 0)[1].detach())
    return difference(*results)


def flow_map_sampling(device: str) -> float:
    results = []
    for d in (device, "cpu"):
        pipe = tiny.pipeline("dit").to(d)
        student = TwoTime(from_pipeline(pipe))
        scheduler = FlowMapScheduler.from_scheduler(pipe.scheduler)
        scheduler.set_timesteps(2, d)
        condition = student.encode(pipe, class_labels=[1, 2])
        results.append(sample(student, scheduler, ItemRNG(0, range(2), d).normal((4, 16, 16)), condition))
    return difference(*results)


def training(loss: str, **settings) -> Callable[[str], float]:
    """Losses of ten steps; the run on the GPU draws the very same noise."""

    def check(device: str) -> float:
        runs = []
        for d in (device, "cpu"):
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    output_dir=folder,
                    model=dict(network="dit", hidden_size=32, num_layers=2, num_heads=2),
                    objective=dict(name="flow_map", loss=loss, **settings),
                    data=dict(name="digits"),
                    optimizer=dict(name="AdamW", lr=1e-3),
                    global_batch_size=16,
                    max_train_steps=10,
                ).check()
                os.environ["ACCELERATE_USE_CPU"] = str(d == "cpu").lower()
                from accelerate.state import AcceleratorState

                AcceleratorState._reset_state(reset_partial_state=True)
                Trainer(build(config), quiet=True).train()
                lines = Path(folder, "metrics.jsonl").read_text().splitlines()
                runs.append(torch.tensor([json.loads(line)["loss"] for line in lines]))
        return difference(*runs)

    return check


# Name, check, largest relative difference accepted.
CHECKS: list[tuple[str, Callable[[str], float], float]] = [
    ("counter-based normals", randomness, 1e-5),
    ("sampling an exact velocity", oracle_sampling, 1e-4),
    ("APG on SD 1.5", guided_pipeline("sd15", APG(guidance_scale=5.0)), 1e-3),
    ("CFG on SDXL", guided_pipeline("sdxl", CFG(guidance_scale=5.0)), 1e-3),
    ("APG on SD3", guided_pipeline("sd3", APG(guidance_scale=5.0)), 1e-3),
    ("two-time SD3, forward mode", two_time_derivative, 1e-3),
    ("two-time DiT, two jumps", flow_map_sampling, 1e-4),
    ("training LSD, dual numbers", training("lsd", jvp="dual"), 1e-3),
    ("training LSD, forward mode", training("lsd", jvp="func"), 1e-3),
    ("training LSD, differences", training("lsd", jvp="finite_difference"), 1e-3),
    ("training PSD-M", training("psd_m"), 1e-3),
]


def rows(device: str) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return sections(
        (name, lambda name=name, check=check, bound=bound: [Row(name, check(device), "", bound, at_least=False)])
        for name, check, bound in CHECKS
    )


if __name__ == "__main__":
    sys.exit(main("checks", __doc__.splitlines()[0], rows))
