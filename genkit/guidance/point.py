"""What a guider is asked, and what it answers."""

from dataclasses import dataclass

from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, Prediction


@dataclass
class Point:
    """Where a guider is asked for a prediction.

    ``z`` is what the network sees (variance-preserving also where a scheduler's own sample is not), shape ``(B, ...)``;
    ``t`` and ``t_next`` are times of the interpolant, shape ``()``; ``timestep`` is the scheduler's own name of ``t``.
    """

    denoiser: Denoiser
    z: Tensor
    t: Tensor
    t_next: Tensor | None
    timestep: Tensor | None
    condition: Condition

    def prediction(self, value: Tensor, prediction_type: str) -> Prediction:
        """A prediction at this point that no network made, from its value in any parametrisation."""
        here = Prediction(value, self.denoiser.prediction_type, self.denoiser.interpolant, self.z, self.t)
        return here.with_value(value, prediction_type)


@dataclass
class Guided:
    """What a guider answers: the prediction to follow, the ones it was made from, and ``z`` if it moved the point.

    ``parts`` names the evaluations behind the answer for whoever looks at them later (particles, ``stats``): ``cond``
    and ``uncond`` by custom, more or none where the rule made others or none.
    """

    prediction: Prediction
    parts: dict[str, Prediction]
    z: Tensor | None = None

    def unmoved(self, point: Point) -> Prediction:
        """The prediction at ``point.z`` from which a step leads where :attr:`prediction` leads from the moved ``z``.

        For steps ``x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D`` (DDIM; Euler on the linear path and in
        variance-exploding samples), where somebody else's loop takes a prediction and no sample.

        Raises:
            ValueError: the time of the step's end is not known.
        """
        if self.z is None:
            return self.prediction
        if point.t_next is None:
            raise ValueError(
                "the prediction for a moved sample depends on where the step ends, which is not known here"
            )
        path, here, there = self.prediction.interpolant, point.t, point.t_next
        ratio = path.sigma(there) / path.sigma(here)
        weight = path.alpha(there) - path.alpha(here) * ratio
        sample = self.prediction.sample + (ratio / weight).to(self.z.device) * (self.z - point.z)
        unmoved = point.prediction(sample, "sample")
        return unmoved.with_raw(unmoved.raw.to(self.prediction.raw.dtype))
