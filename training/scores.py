"""One number for how far a student's samples are from the data, to choose between students by."""

import torch
from torch import Tensor

from genkit.data.base import Source
from genkit.eval.extractors.base import get_extractor
from genkit.eval.inputs import read_images, to_uint8
from genkit.eval.run import evaluate, measure
from genkit.rng import ItemRNG
from genkit.training.build import Run
from genkit.training.fakes import spread
from genkit.training.objectives.base import DivergedError
from genkit.training.samples import draw
from genkit.training.sections import Rounds


class Score:
    """``score(run)``: distance of ``num_samples`` fresh samples from as many of ``source``; smaller is better.

    By an extractor of :mod:`genkit.eval`, the Frechet distance of its features, of pixels; without one, the energy
    distance in the network's space. Noise and conditions are the same at every call, whatever is measured.

    Raises:
        DivergedError: samples that are not finite.
    """

    def __init__(self, source: Source, settings: Rounds, seed: int):
        self.extractor = None if settings.extractor is None else get_extractor(settings.extractor)
        self.settings, self.seed = settings, seed
        self.source, self.records = source, spread(source, settings.num_samples)

    def __call__(self, run: Run, device: torch.device) -> float:
        generated, real = [], []
        for items in torch.arange(len(self.records)).split(self.settings.batch_size):
            read = self.source.__getitems__(self.records[items])
            data = run.inputs({**read, "index": items}, device).x0
            rng = ItemRNG(self.seed, items, device)
            sample = draw(run, read, rng, self.settings.num_inference_steps, tuple(data.shape[1:]))
            if self.extractor is not None:
                sample, data = run.inputs.decode(sample), run.inputs.decode(data)
            generated.append(sample.cpu())
            real.append(data.cpu())
        x, y = torch.cat(generated), torch.cat(real)
        if not x.isfinite().all():
            raise DivergedError("samples hold NaN or infinite values")
        if self.extractor is None:
            return energy_distance(x, y)
        reference = measure(read_images(to_uint8(y)), self.extractor, device=device, quiet=True)
        values = evaluate(
            reference, to_uint8(x), metrics=["frechet"], extractor=self.extractor, device=device, quiet=True
        ).values
        return values["frechet_distance"]


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` over pairs of different samples, in float64; can be a little below 0.

    Args:
        x, y: ``(n, ...)`` and ``(m, ...)``, at least two each.

    Source: Szekely and Rizzo, "Energy statistics", J. Stat. Plan. Inference 143 (2013); the unbiased estimate.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    n, m = len(x), len(y)
    own = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - own).item()
