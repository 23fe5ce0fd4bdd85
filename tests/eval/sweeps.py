"""A sweep without a model: digits, blurred and brightened as if by few steps and much guidance."""

import torch

from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import ImageSet, read_images
from genkit.eval.run import evaluate, measure

METRICS = ["frechet", "prdc", "accuracy", "inception_score", "contrast"]
MMHM = "frechet_distance,recall,class_accuracy,inception_score"


def make_sweep(folder, *, models=("teacher", "student"), steps=(1, 4, 25), guidance=(1.0, 3.0), n=150, **settings):
    """Evaluations as ``genkit eval sweep`` leaves them, below ``folder/cells``."""
    digits = read_images("digits")
    order = torch.randperm(digits.n, generator=torch.Generator().manual_seed(0))
    reference = measure(digits.subset(order[:300].sort().values), get_extractor("digits"), quiet=True)
    rows = order[300 : 300 + n]
    x, labels = digits.load(rows).float(), digits.labels[rows]
    for model in models:
        for count in steps:
            for scale in guidance:
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
                amount = (80 if model == "teacher" else 30) / count**0.8 + 5 * abs(scale - 1.5)
                z = (x + amount * noise - 127) * (1 + 0.2 * (scale - 1)) + 127
                z = z.round().clamp(0, 255).to(torch.uint8)
                name = f"{model}-{count}-{scale:g}"
                made = {"model": f"models/{model}", "steps": count, "guidance_scale": scale}
                made["guider"] = "cfg" if scale != 1 else "none"
                images = ImageSet(name, n, lambda i, z=z: z[i], labels, kind="uint8 L 8x8", notes=("made up",))
                evaluate(
                    reference, images, metrics=METRICS, nfe=count * (1 if scale == 1 else 2), made_with=made,
                    output=folder / "cells" / name, quiet=True, **settings,
                )  # fmt: skip
    return folder
