"""Weighted h-transform guidance: refine a coarse reference."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.denoisers.base import Prediction
from genkit.denoisers.flux import pack
from genkit.guidance.base import Guider, check_range, within
from genkit.guidance.rows import Rows, check_rows, rows_like, rows_of
from genkit.guidance.rule import inner_rule
from genkit.interpolants import Interpolant, Linear, VarianceExploding

_NO_NOISE = 1e-6  # below, the prediction that returns the reference divides by nothing, and its weight is nothing


class HTransform(Guider):
    """Weighted h-transform: follow a coarse reference while there is much noise, the model while there is little.

    Doob's h-transform pins the process to a reference ``y``; a share ``lambda`` of it, after the combination rule, is

        D' = D + lambda (y - D)        lambda = sigma^a        D: predicted clean sample

    and in every parametrisation ``pred' = pred + lambda (pred_y - pred)`` with the prediction ``pred_y`` that would
    return ``y``, finite also where ``alpha = 0``. On paths with ``sigma > 1`` ``sigma / sqrt(1 + sigma^2)`` stands for
    ``sigma``. ``lambda`` is 1 at pure noise and 0 at clean data; larger ``a`` is a weaker reference. With masks
    ``M_k`` that partition the sample each region has its own: ``lambda = sum_k M_k sigma^{a_k}``. No network calls
    beyond the rule's. Works under any scheduler; what a scheduler clips is the mixture.

    How many steps follow the reference depends on the times: with a shifted grid of few steps ``lambda`` falls from 1
    to below 0.1 in one to three. :meth:`stats` shows it.

    What JSON cannot hold is given by ``guider.using(reference=y, masks=m)``:

    - ``reference``: ``(1 or B, ...)`` in the space of the samples (pixels in [-1, 1], or latents as the network is
      given them), of their size. Of Flux's packed latents, unpacked: ``(1 or B, C, H, W)``.
      :mod:`genkit.guidance.coarse` makes one of images, and masks of the size of latents.
    - ``masks``: one a region, values in [0, 1] that sum to 1, broadcastable to the samples; or a single tensor for
      two regions, itself and the rest.
    - ``weight_fn``: ``(sigma, exponent) -> lambda`` in [0, 1], in place of ``sigma^a``.

    Source: "Coarse-guided visual generation via weighted h-transform sampling", arXiv 2603.12057.

    Args:
        exponent: ``a >= 0``, or one a region. By default 16 for video ``(B, C, T, H, W)`` on the linear path, else 5.
        guidance_scale: of classifier-free guidance; without effect if ``rule`` is given.
        rule: another combination rule, as ``{"name": "apg", "guidance_scale": 8}``.
        reference_start, reference_stop: window of the reference on the noise axis, both ends included; outside it the
            rule alone. A first step at exactly pure noise follows the reference whatever the exponent.
        legacy_cogvideox: reproduce the code published for CogVideoX, which has squares of ``alpha`` and ``sigma``
            where they themselves are needed, in the weight and in ``pred_y``; ``v_prediction`` only.
        start, stop, enabled, scheduler_config: see :class:`Guider`; the window of reference and rule together.

    :meth:`stats` has, per evaluation that follows the reference, ``weight`` (``weight_<k>`` with several regions), and
    per sample ``distance``, the rms of ``D - y`` before mixing.

    Raises:
        ValueError: a value outside its range; in :meth:`check` a reference of another size or channel count, masks
            that do not partition the sample or are not one an exponent, weights outside [0, 1].
    """

    takes = {
        "reference": "a tensor (1 or B, ...) in the space of the samples",
        "masks": "a tensor, or a list of one a region, that sum to 1",
        "weight_fn": "a function (sigma, exponent) -> weight in [0, 1]",
    }
    needs = ("reference",)

    @register_to_config
    def __init__(
        self,
        *,
        exponent: float | Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        rule: dict | None = None,
        reference_start: float = 0.0,
        reference_stop: float = 1.0,
        legacy_cogvideox: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        given = list(exponent) if isinstance(exponent, Sequence) else [] if exponent is None else [exponent]
        if exponent == [] or exponent == ():
            raise ValueError(f"exponent={exponent!r}: accepted is a number, or one a region")
        for a in given:
            check_range("exponent", a, 0)
        check_range("reference_start", reference_start, 0, 1)
        check_range("reference_stop", reference_stop, reference_start, 1)
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.hold(inner_rule(rule, guidance_scale))
        self.exponent = exponent
        self.guidance_scale = guidance_scale
        self.rule = rule
        self.reference_start, self.reference_stop = reference_start, reference_stop
        self.legacy_cogvideox = legacy_cogvideox
        self._exponents = given

    @property
    def neutral(self) -> bool:
        return False

    # -- what is refused ------------------------------------------------------------------------------------------

    def check(self, shape, condition=None):
        super().check(shape, condition)
        check_rows("reference", self.given("reference"), shape)
        self._check_masks(shape[0])
        for a in self._exponents or [5.0]:
            for sigma in (0.0, 0.5, 1.0):
                self._weight(sigma, a)

    def check_network(self, network, interpolant, prediction_type, shape, condition=None):
        super().check_network(network, interpolant, prediction_type, shape, condition)
        if self.legacy_cogvideox and prediction_type != "v_prediction":
            raise ValueError(
                f"legacy_cogvideox=True is a formula for v_prediction, and the model's is {prediction_type}"
            )

    def _check_masks(self, batch: int) -> None:
        masks, regions = self._masks(), max(1, len(self._exponents))
        if len(masks) != (regions if regions > 1 else 0):
            raise ValueError(
                f"masks are {len(masks)} (a single tensor is two: itself and the rest), exponent={self.exponent!r} is "
                f"for {regions}: accepted are as many masks as exponents, and none for one"
            )
        full = (batch, *self.given("reference").shape[1:])
        for mask in masks:
            if mask.ndim != len(full) or any(a not in (1, b) for a, b in zip(mask.shape, full, strict=True)):
                sizes = ", ".join(f"1 or {n}" for n in full)
                raise ValueError(f"a mask has shape {tuple(mask.shape)}: accepted is ({sizes})")
        if masks:
            low = min(mask.min().item() for mask in masks)
            worst = torch.as_tensor(sum(masks) - 1).abs().max().item()
            if not (worst <= 1e-5 and low >= 0):  # written so that NaN fails
                raise ValueError(
                    f"masks must partition the sample: values in [0, 1] that sum to 1 everywhere; got a least value of "
                    f"{low:g}, and sums up to {worst:g} off"
                )

    # -- the rule -------------------------------------------------------------------------------------------------

    def initial(self, index):
        return Rows(index, super().initial(index))

    def guide(self, point, state):
        rows = self.begun(point, state)
        if not self.active(point.t):
            return super().guide(point, rows)
        path, sigma = point.denoiser.interpolant, float(point.denoiser.interpolant.sigma(point.t))
        follows = sigma >= _NO_NOISE and within(point.t, self.reference_start, self.reference_stop)
        weights = self._weights(path, sigma, point.z.ndim) if follows else []
        guided, inner_state = self.inner.guide(point, rows.inner_state)
        if weights:
            guided = replace(guided, prediction=self._mixed(guided.prediction, weights, rows.index))
        return guided, Rows(rows.index, inner_state)

    def _weights(self, path: Interpolant, sigma: float, axes: int) -> list[float]:
        """``lambda`` of each region, noted."""
        default = 16.0 if axes == 5 and isinstance(path, Linear) else 5.0
        if isinstance(path, VarianceExploding):
            sigma = sigma / (1 + sigma**2) ** 0.5
        weights = [self._weight(sigma, a) for a in self._exponents or [default]]
        names = ["weight"] if len(weights) == 1 else [f"weight_{k}" for k in range(len(weights))]
        self.note(**dict(zip(names, weights, strict=True)))
        return weights

    def _weight(self, sigma: float, exponent: float) -> float:
        weight_fn = self.given("weight_fn")
        if weight_fn is None:
            return (sigma**2 if self.legacy_cogvideox else sigma) ** exponent
        weight = float(weight_fn(sigma, exponent))
        if not 0 <= weight <= 1:
            raise ValueError(f"weight_fn({sigma:g}, {exponent:g})={weight:g}: accepted are weights in [0, 1]")
        return weight

    def _mixed(self, prediction: Prediction, weights: Sequence[float], index: Tensor) -> Prediction:
        """``raw + lambda (raw_y - raw)``; ``raw_y`` is linear in ``z`` and ``y``."""
        wide = torch.promote_types(prediction.raw.dtype, torch.float32)
        z, raw = prediction.z.to(wide), prediction.raw.to(wide)
        y = rows_like(self.given("reference"), index, z)
        of_z, of_y = _coefficients(prediction, self.legacy_cogvideox)
        returning = (of_z * z).add_(y, alpha=of_y)
        if of_y and not self.legacy_cogvideox:  # raw = of_z z + of_y D
            gap = torch.linalg.vector_norm((raw - returning).flatten(1), dim=1)
            self.note(distance=gap / (abs(of_y) * raw[0].numel() ** 0.5))
        if len(weights) == 1:
            return prediction.with_raw(torch.lerp(raw, returning, weights[0]).to(prediction.raw.dtype))
        masks = [rows_of(mask, index) for mask in self._masks()]
        weight = sum(a * mask.to(z) for a, mask in zip(weights, masks, strict=True))
        assert isinstance(weight, Tensor)
        if weight.ndim == 4 and z.ndim == 3:
            weight = pack(weight.expand(-1, *self.given("reference").shape[1:]))
        return prediction.with_raw(torch.lerp(raw, returning, weight).to(prediction.raw.dtype))

    def _masks(self) -> list[Tensor]:
        """One a region, none if there is one region."""
        masks = self.given("masks")
        if masks is None:
            return []
        if isinstance(masks, Tensor):
            masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
            return [masks, 1 - masks]
        return [mask.to(torch.promote_types(mask.dtype, torch.float32)) for mask in masks]


def _coefficients(prediction: Prediction, legacy_cogvideox: bool) -> tuple[float, float]:
    """``p, q`` such that ``p z + q x0`` is the raw prediction whose clean sample is ``x0``."""
    path, t = prediction.interpolant, prediction.t.double()
    if legacy_cogvideox:
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        return alpha**2 / sigma**2, -1 / sigma**2
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    kind = prediction.prediction_type
    return (
        float(path.convert(zero, "sample", kind, one, t)),
        float(path.convert(one, "sample", kind, zero, t)),
    )
