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


@dataclass
class Guided:
    """What a guider answers: the prediction to follow, the ones it was made from, and ``z`` if it moved the point."""

    prediction: Prediction
    parts: dict[str, Prediction]
    z: Tensor | None = None
