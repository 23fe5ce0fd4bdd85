"""How straight the flow of the model is that makes the images. arXiv 2209.03003."""

from typing import Any

from genkit.eval.flow import require_linear, straightness
from genkit.eval.metrics.base import FeatureSet, Metric

_BATCH = 16


class FlowStraightness(Metric):
    """``straightness`` S of :func:`genkit.eval.flow.straightness`, and ``relative_straightness``, S by the squared
    distance ``transport_cost`` that the flow carries; of the first two lower is better.

    It is that of the network itself, without guidance, under the labels or prompts of the set.

    Args:
        num_samples: noises, with conditions from all over the set.
        num_steps: of the midpoint rule, two network calls each.
        seed: of the noise.

    Raises:
        ValueError: a set that no pipeline with a denoiser makes, or another path than the linear one; before images
            are made.
    """

    by_default = False
    reads_reference = ()
    reads_generated = ("model",)
    better = {"straightness": "lower", "relative_straightness": "lower", "transport_cost": None}

    def __init__(self, num_samples: int = 64, num_steps: int = 32, seed: int = 0):
        for setting, value in {"num_samples": num_samples, "num_steps": num_steps}.items():
            if value < 1:
                raise ValueError(f"{setting}={value}: must be at least 1")
        self.num_samples, self.num_steps, self.seed = num_samples, num_steps, seed

    def check(self, reference: Any, generated: Any) -> None:
        require_linear(generated.model.denoiser())

    def __call__(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, float]:
        model = generated.model
        assert model is not None
        total = cost = 0.0
        with model.evaluating():
            noise, condition = model.start(self.num_samples, self.seed)
            for first in range(0, self.num_samples, _BATCH):
                rows = slice(first, first + _BATCH)
                told = condition.index(rows) if len(condition) else condition
                part = straightness(model.denoiser(), noise[rows], told, num_steps=self.num_steps)
                total += part.total * len(part.x0) / self.num_samples
                cost += part.transport_cost * len(part.x0) / self.num_samples
        return {"straightness": total, "relative_straightness": total / cost, "transport_cost": cost}
