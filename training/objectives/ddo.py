"""Direct discriminative optimisation: a likelihood model is its own discriminator against a frozen reference."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import softplus

from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import Interpolant
from genkit.rng import ItemRNG
from genkit.training.adapters import can_be_switched_off, without_adapter
from genkit.training.objectives.base import (
    Batch,
    DivergedError,
    Loss,
    Objective,
    ObjectiveConfig,
    Phase,
    Role,
    drop_condition,
)
from genkit.training.parts.losses import sum_of_squares, wide
from genkit.training.parts.times import TimeLaw, Uniform


def ddo_loss(delta_real: Tensor, delta_fake: Tensor, alpha: float, beta: float) -> Tensor:
    """``mean softplus(-beta delta_real) + alpha mean softplus(beta delta_fake)``, a scalar.

    The cross-entropy of the discriminator ``sigmoid(beta log(p / p_ref))``, real against fake.

    Args:
        delta_real, delta_fake: ``log p - log p_ref`` of data ``(B,)`` and of the reference's samples ``(B',)``.
        alpha: weight of the fakes.
        beta: scale of the logits, for log-ratios that are *summed* over elements; for means it is ``D`` times larger.
    """
    return softplus(-beta * delta_real).mean() + alpha * softplus(beta * delta_fake).mean()


class ReferenceConfig(ObjectiveConfig):
    """Settings of every form of the method.

    ``alpha``: weight of the fakes; above 1 it pushes away from them. ``beta``: scale of the log-ratio.
    ``condition_dropout``: share of pairs that are compared without condition, for models that are guided. Training
    stops where the mean of ``|beta delta|`` exceeds ``saturation_limit``: sigmoids so far out pass no gradient.
    """

    alpha: float = Field(4.0, gt=0)
    beta: float = Field(0.05, gt=0)
    condition_dropout: float = Field(0.0, ge=0, le=1)
    saturation_limit: float = Field(10.0, gt=0)


class DDOConfig(ReferenceConfig):
    """Settings of :class:`DDO`, beside those of every form.

    ``times``: law of the times, that of the pretraining. ``error``: what the squared error is taken of; unset is what
    the network predicts. ``snr_gamma``: instead of that, error of the clean sample times ``min(SNR, gamma)``.
    """

    times: TimeLaw = Uniform()
    error: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None
    snr_gamma: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_weighting(self):
        if self.error is not None and self.snr_gamma is not None:
            raise ValueError(f"error={self.error!r} and snr_gamma={self.snr_gamma:g} both weigh the errors; set one")
        return self


class DDO(Objective):
    """``E_data softplus(-beta D) + alpha E_ref softplus(beta D)`` with ``D = -w(t) (|e|^2 - |e_ref|^2)``.

    ``e`` and ``e_ref`` are the errors of student and reference in ``error`` at the same ``x_t = alpha(t) x0 + sigma(t)
    eps``, summed over elements: one ``(t, eps)`` a sample, a bound of the likelihood ratio's loss by convexity. Fakes
    are the field ``fake`` of the data, samples of the reference in the network's space under the condition of the real
    sample beside them (``data.name=with_fakes``, which ``rounds`` makes).

    The reference is the teacher if the run has one, else the student as it was at the start: a frozen copy, or the
    network without its adapter (LoRA, SaRA). At ``student = reference`` the loss is ``(1 + alpha) log 2``.

    Raises:
        ValueError: data without fakes, or fakes of another shape.
        DivergedError: saturated sigmoids.

    Source: Zheng et al., "Direct discriminative optimization: your likelihood-based visual generative model is secretly
    a GAN discriminator", arXiv 2503.01103, equations 8 and 12.
    """

    Config: ClassVar[type[ReferenceConfig]] = DDOConfig
    needs_teacher = "optional"
    # Differences of sums of a thousand squares are what is learned from; bf16 has three digits.
    full_precision = True

    def __init__(self, config, student: Denoiser, teacher: Denoiser | None = None):
        super().__init__(config, student, teacher)
        self.reference: Any = teacher  # None is the student without its adapter
        if teacher is None and not can_be_switched_off(student):
            self.reference = student.with_network(copy.deepcopy(student.network))
            self.reference_module = self.reference.module.requires_grad_(False).eval()

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = dict(super().roles)
        if self.teacher is None and self.reference is not None:
            roles["reference"] = Role(self.reference_module, trains=False)
        return roles

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        # No dropout, neither here nor where checkpointed blocks are computed again in the backward.
        self.eval()
        condition, _ = drop_condition(batch, rng, c.condition_dropout)
        fake = self.fakes(batch, condition, rng)
        pairs = torch.cat((batch.x0, fake))
        delta = self.log_ratio(pairs, Condition.cat([condition, condition]) if condition.values else condition, rng)
        real, fake = delta.chunk(2)
        logits = c.beta * delta.detach()
        logs = {
            "beta_delta": logits.abs().mean(),
            # Ties, as all of them at the start, are half right.
            "accuracy": ((real.detach().sign().mean() - fake.detach().sign().mean()) / 2 + 1) / 2,
            "real": softplus(-logits[: len(real)]).mean(),
            "fake": softplus(logits[len(real) :]).mean(),
        }
        size = logs["beta_delta"].item()
        if size > c.saturation_limit:
            raise DivergedError(
                f"the mean of |beta delta| is {size:.1f}, more than saturation_limit={c.saturation_limit:g}: the "
                f"sigmoids are saturated. Lower beta={c.beta:g}, or train for fewer steps a round"
            )
        yield Loss(ddo_loss(real, fake, c.alpha, c.beta), logs)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The reference, for use within: without gradients, and without the student's adapter where it has one."""
        with torch.no_grad(), without_adapter(self.student) if self.reference is None else nullcontext():
            yield self.reference or self.student

    def fakes(self, batch: Batch, condition: Condition, rng: ItemRNG) -> Tensor:
        """Samples of the reference beside those of ``batch``."""
        fake = batch.fields.get("fake")
        if fake is None:
            raise ValueError(
                f"data gives {sorted(batch.fields)}, not the field 'fake' with samples of the reference; add a section "
                "rounds, which generates them, or set data.name=with_fakes"
            )
        if fake.shape != batch.x0.shape:
            raise ValueError(f"fakes have shape {tuple(fake.shape[1:])}, real samples {tuple(batch.x0.shape[1:])}")
        return fake.to(batch.x0)

    def log_ratio(self, x0: Tensor, condition: Condition, rng: ItemRNG) -> Tensor:
        """An estimate of ``log p - log p_ref`` for ``2B`` samples, ``(2B,)``: those of the ``B`` items, twice over."""
        c, path = self.config, self.student.interpolant
        t = torch.cat((c.times.draw(rng), c.times.draw(rng)))
        eps = torch.cat([rng.normal(x0.shape[1:], dtype=x0.dtype) for _ in range(2)])
        kind = "sample" if c.snr_gamma is not None else c.error or self.student.prediction_type
        x, target = path.interpolate(x0, eps, t), path.target(kind, x0, eps, t)

        def error(denoiser: Denoiser) -> Tensor:
            return sum_of_squares(wide(denoiser(x, t, condition).as_type(kind)) - target)

        with self.as_reference() as reference:
            before = error(reference)
        delta = before - error(self.student)
        return delta if c.snr_gamma is None else _clipped_snr(path, t, c.snr_gamma).to(delta) * delta


def _clipped_snr(path: Interpolant, t: Tensor, gamma: float) -> Tensor:
    # Diffusers' snr_gamma: min(SNR, gamma) / SNR for errors of epsilon, which is this for errors of the clean sample.
    return (path.alpha(t) / path.sigma(t)).square().clamp(max=gamma)
