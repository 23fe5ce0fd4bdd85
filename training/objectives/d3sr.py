"""One-step super-resolution, trained against real pictures by a diffusion network that judges samples at any noise."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from genkit.adapters import fused
from genkit.denoisers import from_pipeline
from genkit.denoisers.base import Denoiser
from genkit.denoisers.flux import Flux
from genkit.denoisers.network import unwrap
from genkit.latents import decoded
from genkit.networks.discriminator_head import looks_generated, looks_real
from genkit.networks.fixed_condition import FixedCondition
from genkit.perceptual import DISTS, EADISTS, Padding
from genkit.pipelines.super_resolution import (
    SuperResolutionPipeline,
    restore,
    to_latents,
    unprompted,
    upsampled,
)
from genkit.rng import ItemRNG
from genkit.training import build
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role
from genkit.training.parts.diffusion_discriminator import (
    Adapter,
    DiffusionDiscriminator,
    Head,
    Lora,
    check_judge,
    latent_adapter,
)
from genkit.training.parts.losses import mean_of_squares
from genkit.training.parts.times import TimeLaw, Uniform

LOW = "low"


class Perceptual(BaseModel):
    """EA-DISTS: its ``weight``; ``vgg``, weights of VGG16 as :meth:`genkit.perceptual.DISTS.load` takes them;
    ``padding`` of the edge maps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(1.0, gt=0)
    vgg: str
    padding: Padding = "zeros"


class Adversarial(BaseModel):
    """The judge and the weight of its opinion.

    ``judge``: folder or name of the pipeline of a larger model; unset, a copy of what the student starts from.
    ``latent_adapter``: how it sees the generator's samples, see
    :func:`genkit.training.parts.diffusion_discriminator.latent_adapter`. ``times``: law of the noise at which it
    judges. ``depth``, ``lora``, ``head``, ``dtype``: see
    :class:`genkit.training.parts.diffusion_discriminator.DiffusionDiscriminator`.
    ``optimizer``: settings in place of the run's, for the discriminator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(0.01, gt=0)
    judge: str | None = None
    latent_adapter: Adapter | None = None
    times: TimeLaw = Uniform(low=0.02, high=1.0)
    depth: int | None = Field(None, ge=1)
    lora: Lora | None = Lora()
    head: Head = Head()
    dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: dict[str, Any] = {}


class D3SRConfig(ObjectiveConfig):
    """Settings of :class:`D3SR`. ``scale``: of the data; ``time``: of the generator's one evaluation. Each loss may be
    left out: ``mse_weight=0``, ``perceptual`` or ``adversarial`` unset.
    """

    scale: int = Field(4, ge=2)
    time: float = Field(0.25, gt=0, le=1)
    mse_weight: float = Field(1.0, ge=0)
    perceptual: Perceptual | None = None
    adversarial: Adversarial | None = None

    @model_validator(mode="after")
    def _some(self):
        if self.mse_weight == 0 and self.perceptual is None and self.adversarial is None:
            raise ValueError("mse_weight=0, perceptual=None, adversarial=None: at least one loss must be left")
        return self


class D3SR(Objective):
    """The student restores pictures in one evaluation, ``x = decode(G(encode(upsampled low), time))``; it is taught by

    ``L = mse_weight |x - x_H|^2 / D + w_p EADISTS(x, x_H) + w_a softplus(-D(F(z, t), t))``,

    pictures ``x`` in [-1, 1] (in [0, 1] for EADISTS), ``G`` the clean-sample view of whatever the network predicts,
    whose input is taken as noisy at ``time`` as it is; ``D`` the discriminator, which in turns with the student learns
    ``L_D = softplus(D(F(z, t), t)) + softplus(-D(F(z_H, t), t))``: one ``t`` for both, noise of their own. ``F`` adds
    noise on the judge's path. Student and judge are told of nothing; prompts and labels of the data are not read.

    The data brings ``low`` ``(B, C, h, w)`` beside its pictures ``x0``, as ``super_resolution`` does.

    Source: Li et al., "Distillation-free one-step diffusion for real-world image super-resolution", arXiv 2410.04224.

    Raises:
        ValueError: no loss is left; the judge's autoencoder is another and no adapter was chosen; at the first batch,
            data without ``low`` or of another scale.
    """

    Config = D3SRConfig
    needs_condition = False

    def __init__(
        self,
        config: D3SRConfig,
        student: Denoiser,
        teacher: Denoiser | None = None,
        *,
        condition: FixedCondition,
        vae: nn.Module | None = None,
        perceptual: EADISTS | None = None,
        discriminator: DiffusionDiscriminator | None = None,
        reencoder: tuple[nn.Module | None] | None = None,
    ):
        super().__init__(config, student, teacher)
        self.condition, self.vae, self.perceptual, self.discriminator = condition, vae, perceptual, discriminator
        self.reencodes = reencoder is not None
        self.judge_vae = reencoder[0] if reencoder is not None else None

    @classmethod
    def make(cls, config: D3SRConfig, student: Denoiser, teacher: Denoiser | None, pipe: Any) -> "D3SR":
        vae = pipe.components.get("vae")
        parts: dict[str, Any] = {"condition": unprompted(pipe), "vae": vae}
        if config.perceptual is not None:
            parts["perceptual"] = EADISTS(DISTS.load(config.perceptual.vgg), config.perceptual.padding)
        a = config.adversarial
        if a is not None:
            if a.judge is None:
                judge_pipe, judge = pipe, student.with_network(copy.deepcopy(fused(student.module)))
            else:
                judge_pipe = build.load_pipeline(a.judge, "objective.adversarial.judge")
                judge = from_pipeline(judge_pipe)
            judge_vae = judge_pipe.components.get("vae")
            if latent_adapter(a.latent_adapter, vae, judge_vae) == "reencode":
                if judge_vae is not None:
                    judge_vae.requires_grad_(False).eval()
                parts["reencoder"] = (judge_vae,)
                channels = (
                    judge_vae.config.latent_channels if judge_vae is not None else _picture_channels(student, vae)
                )
            else:
                channels = _latent_channels(student)
            check_judge(judge, channels, a.judge or "the student's own")
            parts["discriminator"] = DiffusionDiscriminator(
                judge,
                unprompted(judge_pipe),
                depth=a.depth,
                lora=a.lora,
                head=a.head,
                dtype=getattr(torch, a.dtype),
            )
        return cls(config, student, teacher, **parts)

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"student": Role(self.student_module, ema=True)}
        if self.discriminator is not None:
            roles["discriminator"] = Role(self.discriminator, optimizer=self.config.adversarial.optimizer)
        frozen = {"condition": self.condition, "vae": self.vae, "judge_vae": self.judge_vae, "dists": self.perceptual}
        return roles | {name: Role(part, trains=False) for name, part in frozen.items() if part is not None}

    def phases(self, step: int) -> Sequence[Phase]:
        generator = Phase("generator", trains=("student",))
        if self.discriminator is None:
            return (generator,)
        return (generator, Phase("discriminator", trains=("discriminator",)))

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        large = batch.fields["x0"]
        low = self._low(batch.fields, large)
        if phase.name == "discriminator":
            with torch.no_grad():
                z = self._restored(low)
                samples = [self._seen(z, None), self._seen(batch.x0, large)]
            logits = self._judged(samples, rng)
            fake, real = looks_generated(logits[0]), looks_real(logits[1])
            right = [(logits[0] < 0).float().mean(), (logits[1] > 0).float().mean()]
            yield Loss((fake + real).mean(), {"right_fake": right[0], "right_real": right[1]})
            return
        z = self._restored(low)
        c, total, logs = self.config, torch.zeros((), device=z.device), {}
        needed = c.mse_weight or self.perceptual is not None or self.reencodes
        picture: Any = decoded(self.vae, z) if needed else None
        if c.mse_weight:
            mse = mean_of_squares(picture - large).mean()
            total, logs["mse"] = total + c.mse_weight * mse, mse.detach()
        if self.perceptual is not None:
            distance = self.perceptual((picture + 1) / 2, (large + 1) / 2).mean()
            total, logs["ea_dists"] = total + c.perceptual.weight * distance, distance.detach()
        if self.discriminator is not None:
            (judged,) = self._judged([self._seen(z, picture)], rng)
            adversarial = looks_real(judged).mean()
            total, logs["adversarial"] = total + c.adversarial.weight * adversarial, adversarial.detach()
        yield Loss(total, logs)

    def restored(self, fields: Mapping[str, Tensor]) -> Tensor:
        return self._restored(self._low(fields, fields["x0"]))

    def pipeline(self, pipe: Any) -> SuperResolutionPipeline:
        module = self.student_module
        name = next(name for name, part in pipe.components.items() if part is module)
        parts = {"scheduler": pipe.scheduler, "condition": self.condition, "vae": self.vae, name: fused(module)}
        return SuperResolutionPipeline(**parts, scale=self.config.scale, time=self.config.time)

    # -- samples ------------------------------------------------------------------------------------------------

    def _restored(self, low: Tensor) -> Tensor:
        with torch.no_grad():
            z = to_latents(self.vae, upsampled(low, self.config.scale))
        return restore(self.student, z, self.config.time, self.condition)

    def _seen(self, z: Tensor, picture: Tensor | None) -> Tensor:
        """Samples ``z`` of the student's space in the judge's; ``picture`` what they decode to, where known."""
        if not self.reencodes:
            return z
        return to_latents(self.judge_vae, decoded(self.vae, z) if picture is None else picture)

    def _judged(self, samples: list[Tensor], rng: ItemRNG) -> tuple[Tensor, ...]:
        """Logits of every batch of ``samples``, all at the same times, each under noise of its own; one call."""
        assert self.discriminator is not None
        t = self.config.adversarial.times.draw(rng)
        noised = [self.discriminator.noised(x, rng.normal(x.shape[1:], dtype=x.dtype), t) for x in samples]
        return self.discriminator(torch.cat(noised), t.repeat(len(samples))).chunk(len(samples))

    def _low(self, fields: Mapping[str, Tensor], large: Tensor) -> Tensor:
        if LOW not in fields:
            raise ValueError(
                f"data brings the fields {sorted(fields)}, but not {LOW!r}; see the source super_resolution"
            )
        low, scale = fields[LOW], self.config.scale
        if large.shape[1:] != (low.shape[1], scale * low.shape[2], scale * low.shape[3]):
            raise ValueError(
                f"objective.scale={scale}: the data has pictures {tuple(large.shape[1:])} and {LOW} "
                f"{tuple(low.shape[1:])}, which must be {scale} times smaller"
            )
        return low


def _latent_channels(student: Denoiser) -> int:
    network: Any = unwrap(student.module)
    return network.config.in_channels // (4 if isinstance(student, Flux) else 1)


def _picture_channels(student: Denoiser, vae: Any) -> int:
    return _latent_channels(student) if vae is None else vae.config.in_channels
