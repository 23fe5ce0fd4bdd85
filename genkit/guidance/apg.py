"""Adaptive projected guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from genkit.denoisers.base import Prediction
from genkit.guidance import arithmetic
from genkit.guidance.base import Guider, check_range
from genkit.interpolants import expand
from genkit.registry import unknown

FORMULATIONS = ("paper", "diffusers", "comfyui")


@dataclass
class Momentum:
    """The running sum before and after the evaluation at ``t``, so that a second one at ``t`` does not add twice."""

    t: Tensor
    before: Tensor | None
    after: Tensor

    def gather(self, index) -> "Momentum":
        t = self.t[index] if self.t.ndim else self.t
        return Momentum(t, None if self.before is None else self.before[index], self.after[index])


class APG(Guider):
    """Adaptive projected guidance: CFG whose push along the conditional prediction is damped, capped and slowed.

    With ``D_c``, ``D_u`` the predicted clean samples, per sample over ``dims``::

        d = D_c - D_u          m = d + beta m_prev          q = m min(1, r / |m|)
        par = <q, D_c> / <D_c, D_c> D_c                     orth = q - par
        D = D_c + (w - 1) (orth + eta par)

    ``eta = 1, r = 0, beta = 0`` is CFG. Unlike CFG the rule depends on the space it acts in: here the clean sample,
    whatever the network predicts; the result goes back through ``Prediction.moved``, without a division by ``alpha``.
    Source: Sadat et al., "Eliminating oversaturation and artifacts of high guidance scales in diffusion models",
    arXiv 2410.02416, algorithm 1 and table 10.

    Args:
        guidance_scale: ``w >= 1``.
        eta: weight of the parallel part, ``>= 0``; above 1 it saturates more than CFG.
        norm_threshold: ``r >= 0`` in units of the clean sample; 0 is no cap. It scales with the root of the number of
            elements: 15 suits SDXL's latents.
        momentum: ``beta`` in ``(-1, 0]``. Advances once per time, also under second-order solvers.
        dims: axes of norms and inner products; by default all but the batch and, for video, the frames.
        formulation: ``paper``; or, to reproduce other programs' images, ``diffusers`` (``u + w (orth + eta par)`` on
            the raw prediction, over all axes) or ``comfyui`` (``D_c + w (...)``, over the last three axes).
        start, stop, enabled, scheduler_config: see :class:`Guider`.

    To choose ``norm_threshold`` by, :meth:`stats` has per evaluation and sample the ``norm`` ``|m|``, the ``cosine`` of
    ``m`` with ``D_c`` and ``capped``, 1 where the threshold bound (the mean over frames for video).

    Raises:
        ValueError: a value outside its range; an ``epsilon`` model where ``alpha = 0``: it has no clean sample there.
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        norm_threshold: float = 15.0,
        momentum: float = -0.5,
        dims: Sequence[int] | None = None,
        formulation: str = "paper",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("guidance_scale", guidance_scale, 1)
        check_range("eta", eta, 0)
        check_range("norm_threshold", norm_threshold, 0)
        check_range("momentum", momentum, -1, 0, open_low=True)
        if formulation not in FORMULATIONS:
            raise ValueError(unknown("formulation", formulation, FORMULATIONS))
        if dims is not None and (not dims or 0 in dims):
            raise ValueError(f"dims={dims!r}: accepted are axes other than 0, which is the batch, at least one")
        super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
        self.guidance_scale = guidance_scale
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self.dims = dims
        self.formulation = formulation

    def combine(self, parts, state):
        cond, uncond, w = parts["cond"], parts["uncond"], self.guidance_scale
        plain = self.eta == 1 and self.norm_threshold == 0 and self.momentum == 0
        if plain and self.formulation != "comfyui":
            return cond.with_raw(arithmetic.cfg(cond.raw, uncond.raw, w, None)), state
        if self.formulation != "diffusers" and cond.prediction_type != "sample" and _at_data(cond):
            return cond, state  # there the network's input is the clean sample: nothing is left to guide
        reference, factor = self._space(cond)
        before = self._before(cond.t, state) if self.momentum else None
        gain = w if self.formulation in ("diffusers", "comfyui") else w - 1
        update, push, norm, cosine, cap = arithmetic.apg(
            cond.raw,
            uncond.raw,
            reference,
            factor,
            before,
            self.norm_threshold or None,
            gain,
            gain * (self.eta - 1),
            momentum=self.momentum,
            dims=self._axes(reference),
        )
        self.note(norm=_per_sample(norm), cosine=_per_sample(cosine), capped=_per_sample((cap < 1).to(cap.dtype)))
        if self.momentum:
            state = Momentum(cond.t, before, push)
        if self.formulation == "diffusers":
            return cond.with_raw((uncond.raw + update).to(cond.raw.dtype)), state
        return cond.moved(update), state

    def _space(self, cond: Prediction) -> tuple[Tensor, Tensor | None]:
        """The conditional prediction in the space of the rule, and the factor of a difference on its way there."""
        wide = torch.promote_types(cond.raw.dtype, torch.float32)
        if self.formulation == "diffusers":
            return cond.raw.to(wide), None
        # Conversions are linear, so that of the difference is a factor: near the data x would swamp it.
        factor = cond.interpolant.convert(
            torch.ones_like(cond.t), cond.prediction_type, "sample", torch.zeros_like(cond.t), cond.t
        )
        return cond.sample.to(wide), expand(factor, cond.raw).to(cond.raw.device, wide)

    def _before(self, t: Tensor, state: Momentum | None) -> Tensor | None:
        if state is None:
            return None
        return state.before if torch.equal(state.t, t) else state.after

    def _axes(self, x: Tensor) -> tuple[int, ...]:
        if self.dims is not None:
            return tuple(self.dims)
        if self.formulation == "comfyui":
            return tuple(range(max(1, x.ndim - 3), x.ndim))
        frames = {2} if x.ndim == 5 and self.formulation == "paper" else set()
        return tuple(d for d in range(1, x.ndim) if d not in frames)


def _per_sample(x: Tensor) -> Tensor:
    """Diagnostics ``(B,)``, averaged over frames where there are any."""
    return x.flatten(1).mean(1)


def _at_data(prediction: Prediction) -> bool:
    t = prediction.t.to(torch.promote_types(prediction.z.dtype, torch.float32))
    return bool((expand(prediction.interpolant.sigma(t), t) == 0).any())
