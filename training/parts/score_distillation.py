"""Score distillation: what a frozen diffusion model says of a sample, as a gradient on that sample.

At ``x_t = alpha x + sigma eps`` the teacher predicts the noise ``e_T``, guided. Every method is the same estimator with
another baseline ``b`` and another weight::

    g = w (e_T - b)          loss = |x - sg(x - g)|^2 / 2,   whose gradient with respect to x is g

====== =========================== =================== ==========================================================
method ``b``                       ``w`` as published  source
====== =========================== =================== ==========================================================
sds    ``eps``, the noise drawn    ``sigma2``          Poole et al., "DreamFusion", arXiv 2209.14988
sjc    0                           ``sigma2``          Wang et al., "Score Jacobian chaining", arXiv 2212.00774
csd    see :func:`residual`        ``sigma2``          Yu et al., "Text-to-3D with classifier score distillation",
                                                       arXiv 2310.19415
nfsd   see :func:`residual`        ``sigma2``          Katzir et al., "Noise-free score distillation", arXiv 2310.17590
vsd    a fake model's prediction   ``sigma2``          Wang et al., "ProlificDreamer", arXiv 2305.16213
dmd    a fake model's prediction   ``dmd``             Yin et al., "One-step diffusion with distribution matching
                                                       distillation", arXiv 2311.18828
====== =========================== =================== ==========================================================

The fake model is fitted to the samples themselves, so that ``vsd`` and ``dmd`` follow the gradient of
``KL(p_fake,t | p_real,t)``; ``sds`` is the case of a point mass, which seeks a mode. Predictions of any type enter by
their views. Guidance is in Diffusers' convention: much published code of SDS means ``1 + s`` by ``s``.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.interpolants import Interpolant, expand
from genkit.training.parts.losses import wide

Method = Literal["sds", "sjc", "csd", "nfsd", "vsd", "dmd"]
Weight = Literal["sigma2", "alpha_sigma2", "one", "dmd"]
Reduction = Literal["sum", "mean"]

NEEDS_FAKE = ("vsd", "dmd")
_NFSD_NOISE_ONLY = 0.2  # below this time the unconditional prediction is noise already


class Teacher(NamedTuple):
    """A frozen model's predictions at one ``(x_t, t)``: under the condition, under none, under a negative prompt."""

    cond: Prediction
    null: Prediction | None = None
    negative: Prediction | None = None

    def epsilon(self, guidance_scale: float = 1.0) -> Tensor:
        """``e_null + w (e_cond - e_null)``, in float32 at least."""
        cond = wide(self.cond.epsilon)
        if self.null is None:
            return cond
        null = wide(self.null.epsilon)
        return null + guidance_scale * (cond - null)


@torch.no_grad()
def ask(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, *, null: bool, negative: Condition | None = None
) -> Teacher:
    """The predictions of ``denoiser``, without gradient, in one batch."""
    conditions = [condition, *([condition.null()] if null else []), *([negative] if negative is not None else [])]
    first, *rest = denoiser.many(x_t, t, conditions)
    return Teacher(first, rest[0] if null else None, rest[-1] if negative is not None else None)


def needs_null(method: Method, guidance_scale: float, condition: Condition) -> bool:
    """Whether ``method`` asks for the unconditional prediction."""
    return method in ("csd", "nfsd") or (guidance_scale != 1 and bool(condition.values))


def residual(
    method: Method, teacher: Teacher, eps: Tensor, guidance_scale: float = 1.0, fake: Tensor | None = None
) -> Tensor:
    """``e_T - b`` ``(B, ...)``, in float32 at least.

    ``csd`` keeps the classifier's part alone, ``e_cond - e_null``. ``nfsd`` is ``d + w (e_cond - e_null)`` with ``d =
    e_null`` below ``t = 0.2`` and ``e_null - e_negative`` above.

    Args:
        teacher: from :func:`ask`, with the parts that the method needs.
        eps: the noise in ``x_t``.
        guidance_scale: ``w`` of ``e_T``; no part of ``csd``.
        fake: the fake model's ``e``, of ``vsd`` and ``dmd``.

    Raises:
        ValueError: a part that the method needs is missing.
    """
    if method in NEEDS_FAKE:
        if fake is None:
            raise ValueError(f"method={method!r} needs the prediction of a fake model, got fake=None")
        return teacher.epsilon(guidance_scale) - wide(fake)
    if method == "sds":
        return teacher.epsilon(guidance_scale) - wide(eps)
    if method == "sjc":
        return teacher.epsilon(guidance_scale)
    if teacher.null is None or (method == "nfsd" and teacher.negative is None):
        parts = "the unconditional prediction" + (" and that of a negative prompt" if method == "nfsd" else "")
        raise ValueError(f"method={method!r} needs {parts}")
    null = wide(teacher.null.epsilon)
    direction = wide(teacher.cond.epsilon) - null
    if method == "csd":
        return direction
    assert teacher.negative is not None
    clean = expand(torch.as_tensor(teacher.cond.t) < _NFSD_NOISE_ONLY, null)
    return torch.where(clean, null, null - wide(teacher.negative.epsilon)) + guidance_scale * direction


def weights(kind: Weight, t: Tensor, interpolant: Interpolant, error: Tensor) -> Tensor:
    """``w`` ``(B,)``: ``sigma^2``, ``alpha sigma^2``, 1, or that of ``dmd``.

    ``dmd`` is ``(sigma / alpha) / mean|x - x_T|`` with ``x_T`` the teacher's clean sample. Since ``x_t`` holds the same
    ``x``, ``x - x_T = (sigma / alpha) (e_T - eps)``: it is ``1 / mean|e_T - eps|``, finite up to pure noise.

    Args:
        error: ``e_T - eps`` ``(B, ...)``, guided.
    """
    t = t.to(error.dtype)
    sigma = interpolant.sigma(t)
    if kind == "sigma2":
        return sigma**2
    if kind == "alpha_sigma2":
        return interpolant.alpha(t) * sigma**2
    if kind == "dmd":
        return 1 / error.abs().flatten(1).mean(1).clamp(min=1e-6)
    return torch.ones_like(sigma)


def safe(residual: Tensor, weight: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Residual and weight without items that are not finite, and with ``w |r|_rms`` at most ``clip``.

    Returns also which items ``(B,)`` were dropped: their residual and weight are 0.
    """
    finite = residual.flatten(1).isfinite().all(1) & weight.isfinite()
    residual = residual.where(expand(finite, residual), 0)
    weight = weight.where(finite, 0)
    if clip is not None:
        size = weight * residual.square().flatten(1).mean(1).sqrt()
        weight = weight * (clip / size.clamp(min=1e-30)).clamp(max=1)
    return residual, weight, ~finite


def gradient_loss(x: Tensor, residual: Tensor, weight: Tensor, reduction: Reduction = "sum") -> Tensor:
    """``|x - sg(x - w r)|^2 / 2`` ``(B,)``, summed or averaged over elements: its gradient by ``x`` is ``w r``.

    Its value is ``|w r|^2 / 2`` and tells nothing about convergence.
    """
    x = wide(x)
    target = (x - expand(weight, x) * residual).detach()
    return _half_square(x - target, reduction)


def moving_target(x: Tensor, residual: Tensor, t: Tensor, interpolant: Interpolant) -> Tensor:
    """``x - (sigma / alpha) r``: where a residual points to. For ``sds`` it is the teacher's clean sample."""
    x = wide(x.detach())
    t = t.to(x.dtype)
    return x - expand(interpolant.sigma(t) / interpolant.alpha(t), x) * residual


def reconstruction_loss(
    x: Tensor, target: Tensor, weight: Tensor, t: Tensor, interpolant: Interpolant, reduction: Reduction = "sum"
) -> Tensor:
    """``w (alpha / sigma) |x - sg(target)|^2 / 2`` ``(B,)``: with :func:`moving_target` the gradient is ``w r`` again.

    ``x`` and ``target`` may also be pictures, the second decoded from the moving target: then no gradient goes through
    an encoder.

    Source: Guo et al., "StableDreamer: taming noisy score distillation sampling for text-to-3D", arXiv 2312.02189.
    """
    t = t.to(weight.dtype)
    factor = weight * interpolant.alpha(t) / interpolant.sigma(t)
    return factor * _half_square(wide(x) - wide(target).detach(), reduction)


def _half_square(difference: Tensor, reduction: Reduction) -> Tensor:
    square = difference.square().flatten(1) / 2
    return square.sum(1) if reduction == "sum" else square.mean(1)
