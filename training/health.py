"""Alarms: signs that a run goes wrong while its loss still looks like a loss."""

from collections import deque
from statistics import median

from torch import Tensor

from genkit.training.objectives.base import DivergedError

_HISTORY = 100
_LEAST = 20


class Health:
    """Watches gradient norms and samples; every alarm is a sentence for the log.

    Args:
        settings: thresholds, :class:`genkit.training.sections.Health`.
    """

    def __init__(self, settings):
        self.settings = settings
        self._norms: dict[str, deque[float]] = {}
        self._alarms_in_a_row = 0

    def gradient_norm(self, step: int, role: str, norm: float) -> str | None:
        """The alarm of a norm far above the median of the last hundred; steps without gradient do not count."""
        history = self._norms.setdefault(role, deque(maxlen=_HISTORY))
        usual = median(history) if len(history) >= _LEAST else None
        if norm:
            history.append(norm)
        if usual is None or norm <= self.settings.grad_norm_spike * usual:
            return None
        times = f"{norm / usual:.0f} times its running median {usual:.3g}"
        return f"step {step}: gradient norm of {role} is {norm:.3g}, {times}"

    def samples(self, step: int, samples: Tensor, data: Tensor | None) -> tuple[dict[str, float], list[str]]:
        """Measures of ``samples`` ``(B, ...)`` beside ``data`` ``(B, ...)``, where there is any, and alarms.

        ``saturation``: share of values at or outside the range of the data. ``variance_ratio``: variance across the
        batch, averaged over positions, relative to the data's.

        Raises:
            DivergedError: samples that are not finite, or alarms at the last ``patience`` samplings.
        """
        if not samples.isfinite().all():
            raise DivergedError(f"step {step}: samples hold NaN or infinite values")
        if data is None:
            return {}, []
        measures, alarms = self._compare(step, samples.detach().float(), data.detach().float())
        self._alarms_in_a_row = self._alarms_in_a_row + 1 if alarms else 0
        if self._alarms_in_a_row == self.settings.patience:
            raise DivergedError(f"{alarms[0]}; so did health.patience={self.settings.patience} samplings in a row")
        return measures, alarms

    def _compare(self, step: int, samples: Tensor, data: Tensor) -> tuple[dict[str, float], list[str]]:
        low, high = data.min(), data.max()
        at_ends = [((x <= low) | (x >= high)).float().mean().item() for x in (samples, data)]
        spread = [x.var(dim=0, unbiased=False).mean().item() for x in (samples, data)]
        ratio = spread[0] / spread[1] if spread[1] else float("nan")
        measures = {"samples/saturation": at_ends[0], "samples/variance_ratio": ratio}
        alarms = []
        if at_ends[0] > at_ends[1] + self.settings.saturation:
            alarms.append(
                f"step {step}: samples saturate: {at_ends[0]:.0%} of their values lie at or outside the data's range "
                f"[{low:.3g}, {high:.3g}], against {at_ends[1]:.0%} of the data's"
            )
        if len(samples) > 1 and ratio < self.settings.variance_collapse:
            alarms.append(f"step {step}: samples collapse: their variance is {ratio:.1%} of the data's")
        return measures, alarms
