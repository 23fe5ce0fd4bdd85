"""Guiders compared on digits: each at its best of five scales, all with the same number of network calls an image.

The model is that of configs/digits/flow_matching.yaml; the weak one of autoguidance is the same after a tenth of the
training; the classifier of GFCG is trained here and is not the one that measures. 1,797 images a row, from the same
noise, with the classes of the real ones, on as many steps as 32 network calls allow. A guider's best scale is by its
Frechet distance. Saturation is by how much pixels leave [-1, 1] before they are clipped, on average: 0 for real ones.
Particles of a group want one class and are drawn anew by weight at the end, so that each image costs as much as others.
Experts is left out: with exponents w and 1 - w it is CFG.
Guiders under "given" see a part of the real image of the same number: those rows compare with nothing but each other.

Bounds: at scales 6, 8 and 10 APG has a higher recall than CFG, and a lower saturation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _common import report
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from genkit.data.digits import Digits
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images, to_uint8
from genkit.eval.run import evaluate, measure
from genkit.guidance.apg import APG
from genkit.guidance.autoguidance import Autoguidance
from genkit.guidance.base import Guider
from genkit.guidance.cfg import CFG
from genkit.guidance.cfg_mp import CFGMP
from genkit.guidance.gfcg import GFCG
from genkit.guidance.h_transform import HTransform
from genkit.guidance.readout import Readout, SpatialTarget
from genkit.networks.digits_classifier import DigitsClassifier
from genkit.networks.readout_head import ReadoutHead
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.feynman_kac import FeynmanKacPipeline
from genkit.rng import ItemRNG
from genkit.training.__main__ import train
from genkit.training.config import load_config
from genkit.training.objectives.readout import edges

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "outputs" / "guidance_digits"
CALLS, BATCH = 32, 592
HIGH = (6, 8, 10)


def trained(name: str, recipe: str, *overrides: str) -> Path:
    """The folder of a training, made once."""
    output = FOLDER / name
    if not (output / "done").is_file():
        path = ROOT / "configs" / "digits" / f"{recipe}.yaml"
        train(load_config(path, [f"output_dir={output}", "resume=latest", *overrides]))
        (output / "done").touch()
    return output


@cache
def model(name: str = "teacher", *overrides: str) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline.from_pretrained(trained(name, "flow_matching", *overrides) / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def corrected() -> FeynmanKacPipeline:
    pipe = FeynmanKacPipeline.from_pipe(model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def wanted() -> tuple[Tensor, Tensor]:
    """Items by class, and the classes they are drawn for: the same for each 16 in a row, as many as a group has."""
    labels = Digits().labels
    items = labels.argsort(stable=True)
    return items, labels[items][::16].repeat_interleave(16)[: len(items)]


@cache
def pictures() -> Tensor:
    """The real images, ``(1797, 1, 8, 8)`` in [-1, 1]."""
    return Digits().images


@cache
def classifier() -> DigitsClassifier:
    """Another one than that which measures: other weights, trained on noisy images too."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = DigitsClassifier(dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    labels = Digits().labels
    with torch.enable_grad():
        for _ in range(600):
            items = torch.randint(len(labels), (128,), generator=generator)
            noise = torch.randn(128, 1, 8, 8, generator=generator) * torch.rand(128, 1, 1, 1, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(pictures()[items] + 0.5 * noise), labels[items]).backward()
            optimizer.step()
    return network.eval()


@cache
def head() -> ReadoutHead:
    folder = trained("readout", "readout", f"model.pretrained={trained('teacher', 'flow_matching') / 'pipeline'}")
    return ReadoutHead.from_pretrained(folder / "head")


def apg(scale: float, items: Tensor) -> Guider:
    return APG(guidance_scale=scale, eta=0, norm_threshold=2.5, momentum=-0.5)


def autoguidance(scale: float, items: Tensor) -> Guider:
    return Autoguidance(guidance_scale=scale).using(weak=model("weak", "max_train_steps=100").transformer)


def gfcg(scale: float, items: Tensor) -> Guider:
    return GFCG(strength=scale, classify_start=0.2).using(classifier=classifier())


def h_transform(exponent: float, items: Tensor) -> Guider:
    coarse = F.interpolate(F.avg_pool2d(pictures()[items], 2), scale_factor=2, mode="bilinear")
    return HTransform(exponent=exponent, guidance_scale=1).using(reference=coarse)


def readout(step_size: float, items: Tensor) -> Guider:
    target = SpatialTarget(head=head(), control=edges(pictures()[items]) - 0.5)
    guider = Readout(step_size=step_size, update="normalised", guidance_scale=1, branches="conditional")
    return guider.using(targets={"edges": target})


def guided(make: Callable[[float, Tensor], Guider | None]) -> "Draw":
    """Images of ``items`` by the model under ``make(scale, items)``, and the network calls of each."""

    def draw(scale: float, items: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, int]:
        noise = ItemRNG(0, items).normal((1, 8, 8))
        out = model()(labels, steps, guider=make(scale, items), latents=noise, output_type="latent")
        return out.images, out.network_calls

    return draw


def noisy(particles: int) -> "Draw":
    """The same under CFG and a sampler that injects noise, in groups of corrected particles drawn anew by weight."""

    def draw(scale: float, items: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, int]:
        first = items[::particles]
        out = corrected()(
            class_labels=labels[::particles],
            num_inference_steps=steps,
            num_particles=particles,
            guidance_scale=scale,
            generator=ItemRNG(0, first).generators(),
            output_type="latent",
        )
        drawn = ItemRNG(1, first).uniform((particles,), dtype=torch.float64)
        chosen = torch.searchsorted(out.weights.cumsum(1), drawn).clamp(max=particles - 1)
        rows = (chosen + particles * torch.arange(len(first))[:, None]).flatten()
        return out.images[rows], out.network_calls

    return draw


Draw = Callable[[float, Tensor, Tensor, int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Entry:
    """A method at several scales: ``draw(scale, items, labels, steps)``."""

    draw: Draw
    scales: tuple[float, ...]
    what: str = "guidance_scale"
    given: str = ""


LOW = (1.25, 1.5, 2, 3, 4)
ENTRIES = {
    "none": Entry(guided(lambda scale, items: None), (1,)),
    "cfg": Entry(guided(lambda scale, items: CFG(guidance_scale=scale)), (*LOW, *HIGH)),
    "apg": Entry(guided(apg), (*LOW, *HIGH)),
    "cfg_mp": Entry(guided(lambda scale, items: CFGMP(guidance_scale=scale, anderson_window=0)), LOW),
    "cfg_mp+": Entry(guided(lambda scale, items: CFGMP(guidance_scale=scale)), LOW),
    "cfg_mp+, trust": Entry(guided(lambda scale, items: CFGMP(guidance_scale=scale, trust_radius=0.1)), LOW),
    "autoguidance": Entry(guided(autoguidance), (1.25, 1.5, 2, 2.5, 3)),
    "gfcg": Entry(guided(gfcg), (0.25, 0.5, 1, 2, 4), "strength"),
    "cfg, noisy sampler": Entry(noisy(1), LOW),
    "cfg + FKC, K = 4": Entry(noisy(4), LOW),
    "cfg + FKC, K = 16": Entry(noisy(16), LOW),
    "h_transform": Entry(guided(h_transform), (1, 2, 5, 10, 20), "exponent", "its image at half the resolution"),
    "readout": Entry(guided(readout), (0.02, 0.05, 0.1, 0.2, 0.4), "step_size", "its edges"),
}


def most_steps(entry: Entry) -> int:
    """The most steps that stay within the calls."""
    for n in range(CALLS, 0, -1):
        if entry.draw(entry.scales[-1], *(v[:1] for v in wanted()), n)[1] <= CALLS:
            return n
    raise ValueError(f"one step of {entry} takes more than {CALLS} calls")


def row(name: str, scale: float, n: int, real) -> dict[str, Any]:
    entry, images, calls = ENTRIES[name], [], 0
    items, labels = wanted()
    for part, wanted_of_part in zip(items.split(BATCH), labels.split(BATCH), strict=True):
        made, spent = entry.draw(scale, part, wanted_of_part, n)
        images.append(made[: len(part)])
        calls = max(calls, spent)
    pixels = torch.cat(images)
    metrics = ("frechet", "prdc", "accuracy")
    values = evaluate(real, (to_uint8(pixels), labels), metrics=metrics, extractor="digits", quiet=True).values
    return {
        "guider": name,
        "given": entry.given,
        "setting": f"{entry.what}={scale:g}",
        "steps": n,
        "calls": calls,
        "Frechet distance": values["frechet_distance"],
        "accuracy": values["class_accuracy"],
        "recall": values["recall"],
        "saturation": (pixels.abs() - 1).clamp(min=0).mean().item(),
    }


def main() -> None:
    real = measure(read_images("digits"), get_extractor("digits"), quiet=True)
    at: dict[tuple[str, float], dict[str, Any]] = {}
    for name, entry in tqdm(ENTRIES.items(), unit="guider"):
        n = most_steps(entry)
        for scale in entry.scales:
            at[name, scale] = row(name, scale, n, real)
    plain = at["none", 1]["Frechet distance"]
    rows = []
    for name, entry in ENTRIES.items():
        best = min((at[name, scale] for scale in entry.scales[:5]), key=lambda r: r["Frechet distance"])
        rows.append(best | {"helps": "-" if name == "none" else "yes" if best["Frechet distance"] < plain else "no"})
    rows += [at[name, scale] | {"helps": ""} for scale in HIGH for name in ("cfg", "apg")]
    bounds = {}
    for scale in HIGH:
        ours, theirs = at["apg", scale], at["cfg", scale]
        bounds[f"recall of CFG less that of APG at {scale}"] = (theirs["recall"] - ours["recall"], 0.0)
        bounds[f"saturation of APG less that of CFG at {scale}"] = (ours["saturation"] - theirs["saturation"], 0.0)
    report("guidance_digits", rows, bounds)


if __name__ == "__main__":
    main()
