"""One- and few-step generators by score distillation: SDS, VSD, DMD and DMD2 as combinations of settings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.interpolants import expand
from genkit.latents import unstandardise
from genkit.networks.discriminator_head import DiscriminatorHead, looks_generated, looks_real
from genkit.rng import ItemRNG
from genkit.schedulers.renoise import RenoiseScheduler
from genkit.training.objectives.base import Batch, DivergedError, Loss, Objective, ObjectiveConfig, Phase, Role
from genkit.training.parts.annealing import Constant, Schedule
from genkit.training.parts.fake import FakeModel, FakeSettings, FullFake
from genkit.training.parts.losses import evaluating, mean_of_squares, wide
from genkit.training.parts.score_distillation import (
    NEEDS_FAKE,
    Reduction,
    Weight,
    ask,
    gradient_loss,
    moving_target,
    needs_null,
    reconstruction_loss,
    residual,
    safe,
    weights,
)


class Gan(BaseModel):
    """A discriminator on the fake network's features, against real data; see :class:`DiscriminatorHead`.

    ``generator_weight`` and ``fake_weight``: of its terms in the two losses. ``at``: the sub-modules that it reads.
    """

    model_config = ConfigDict(extra="forbid")
    generator_weight: float = Field(1e-3, gt=0)
    fake_weight: float = Field(1e-2, gt=0)
    at: list[str] | None = Field(None, min_length=1)
    hidden_size: int = 256
    num_layers: int = 2
    stride: int = 1
    norm_num_groups: int = 32
    optimizer: dict[str, Any] = {}


class ScoreDistillationConfig(ObjectiveConfig):
    """Settings of :class:`ScoreDistillation`.

    ``method``, ``weight`` (unset: as published), ``guidance_scale`` (of the teacher; 1 is none): see
    :mod:`genkit.training.parts.score_distillation`. ``times``: when the teacher is asked. ``clip``: bound on the root
    mean square of an item's gradient. ``reduction``: over an item's elements. ``form``: ``recon`` regresses on the
    moving target, in ``space=image`` as pictures that the pipeline's VAE decodes. ``timesteps``: at which the generator
    jumps, in the network's own timesteps as pipelines take them, decreasing; unset, one jump from pure noise.
    ``fake``: unset means a full copy of the teacher, where the method needs one. ``gan``: a discriminator's term.
    ``regression_weight``: of the squared error on pairs of noise and sample of the teacher (DMD), fields ``eps`` and
    ``x0`` of the data.
    """

    method: Literal["sds", "sjc", "csd", "vsd", "dmd"] = "dmd"
    weight: Weight | None = None
    guidance_scale: float = Field(1.0, ge=0)
    times: Schedule = Constant()
    clip: float | None = Field(None, gt=0)
    reduction: Reduction = "mean"
    form: Literal["gradient", "recon"] = "gradient"
    space: Literal["latent", "image"] = "latent"
    timesteps: list[float] | None = Field(None, min_length=1)
    fake: FakeSettings | None = None
    gan: Gan | None = None
    regression_weight: float | None = Field(None, gt=0)

    @field_validator("timesteps")
    @classmethod
    def _decreasing(cls, value):
        if value is not None and any(a <= b for a, b in zip(value, value[1:], strict=False)):
            raise ValueError("must decrease")
        return value

    @model_validator(mode="after")
    def _fits(self):
        if self.method in NEEDS_FAKE:
            self.fake = self.fake or FullFake()
        elif self.fake is not None or self.gan is not None:
            raise ValueError(
                f"method={self.method!r} has no fake network; fake and gan go with {' and '.join(NEEDS_FAKE)}"
            )
        if self.method == "csd" and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: method='csd' is the guidance alone, whatever its scale"
            )
        if self.space == "image" and self.form != "recon":
            raise ValueError(f"space='image' needs form='recon', got form={self.form!r}")
        if self.regression_weight is not None and len(self.timesteps or [0]) > 1:
            raise ValueError(f"regression_weight={self.regression_weight} needs one timestep, got {self.timesteps}")
        return self


class ScoreDistillation(Objective):
    """A generator follows ``w (e_T - b)`` on its own samples, and a fake network follows the generator.

    ``x = D_student(z, t_k)`` where ``z`` is noise, or for later ``k`` the generator's own earlier sample with noise put
    back ("backward simulation"); ``k`` is uniform over ``timesteps``. Then ``x_t = alpha x + sigma eps``, and the
    gradient of :mod:`genkit.training.parts.score_distillation` reaches the generator through ``x``. Before each update
    of the generator the fake network has ``fake.repeats`` updates by denoising ``x``. With ``gan`` the discriminator
    reads the fake network's features of noised samples::

        generator   + generator_weight softplus(-D(x_t))
        fake, head  + fake_weight [softplus(D(x_t)) + softplus(-D(real_t))]

    DMD2 is ``method=dmd`` with ``gan``. No data is needed without ``gan`` and ``regression_weight``. What the generator
    samples by is :class:`genkit.schedulers.renoise.RenoiseScheduler`.

    Source: Yin et al., "One-step diffusion with distribution matching distillation", arXiv 2311.18828, and "Improved
    distribution matching distillation for fast image synthesis", arXiv 2405.14867; others as named there.

    Raises:
        ValueError: timesteps off the path; ``space=image`` without VAE; at the first batch, guidance without an
            unconditional branch, or data without pairs.
        DivergedError: no item of a batch has a finite gradient.
    """

    Config = ScoreDistillationConfig
    needs_teacher = "required"

    teacher: Denoiser

    def __init__(
        self, config: ScoreDistillationConfig, student: Denoiser, teacher: Denoiser | None = None, vae: Any = None
    ):
        super().__init__(config, student, teacher)
        self._vae = (vae,)  # in a tuple, so that it is no part of what is wrapped and trained
        if config.space == "image" and vae is None:
            raise ValueError("space='image' decodes by the pipeline's VAE, and the pipeline has none")
        self.steps = _steps(student, config.timesteps)
        self.fake = None
        if config.fake is not None:
            self.fake = FakeModel(config.fake, self.teacher)
            self.fake_module = self.fake.module
        self.head = None
        if config.gan is not None:
            settings = config.gan.model_dump(exclude={"generator_weight", "fake_weight", "optimizer", "at"})
            self.head = DiscriminatorHead.for_network(self.fake_module, config.gan.at, **settings)

    @classmethod
    def make(cls, config, student, teacher, pipe):
        return cls(config, student, teacher, getattr(pipe, "vae", None))

    # -- what the trainer asks ------------------------------------------------------------------------------------

    @property
    def needs_samples(self) -> bool:  # type: ignore[override]
        return self.config.gan is not None or self.config.regression_weight is not None

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = dict(super().roles)
        if self.fake is not None:
            roles["fake"] = Role(self.fake.module, optimizer=self.fake.settings.optimizer)
            if self.fake.is_adapter:
                del roles["teacher"]  # of whose module the fake model is a part
        if self.head is not None:
            roles["head"] = Role(self.head, optimizer=self.config.gan.optimizer)
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        generator = Phase("student", trains=("student",))
        if self.fake is None:
            return (generator,)
        trains = ("fake",) if self.head is None else ("fake", "head")
        return (Phase("fake", trains=trains, repeats=self.fake.settings.repeats), generator)

    def scheduler(self, scheduler: Any) -> RenoiseScheduler:
        times = self.steps[0].tolist()  # as they are: no shift, no spacing
        return RenoiseScheduler.from_scheduler(scheduler, shift=1.0, timestep_spacing="uniform", trained_times=times)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        yield self._fake_loss(batch, rng) if phase.name == "fake" else self._generator_loss(batch, rng)

    # -- the generator --------------------------------------------------------------------------------------------

    def _generate(self, batch: Batch, rng: ItemRNG) -> Tensor:
        """Samples ``(B, ...)`` of the generator's steps, each by a step drawn for its item."""
        shape, condition = batch.x0.shape[1:], batch.condition
        times, timesteps = (v.to(batch.x0.device) for v in self.steps)
        z = rng.normal(shape, dtype=batch.x0.dtype)
        k = rng.integers(len(times))
        with torch.no_grad(), evaluating(self.student_module):
            for j in range(len(times) - 1):
                fresh = rng.normal(shape, dtype=batch.x0.dtype)
                going = (k > j).nonzero()[:, 0]
                # Every process makes the same number of calls, which sharded networks count on.
                at = going if len(going) else k.new_zeros(1)
                here = (condition.index(at), times[j].expand(len(at)), timesteps[j].expand(len(at)))
                clean = self.student(z[at], here[1], here[0], timestep=here[2]).sample
                moved = self.student.interpolant.interpolate(wide(clean), fresh[at], times[j + 1].expand(len(at)))
                z = z.index_copy(0, going, moved[: len(going)].to(z.dtype))
        return wide(self.student(z, times[k], condition, timestep=timesteps[k]).sample)

    def _generator_loss(self, batch: Batch, rng: ItemRNG) -> Loss:
        c, path = self.config, self.teacher.interpolant
        x = self._generate(batch, rng)
        t = c.times.draw(rng, batch.progress)
        eps = rng.normal(x.shape[1:], dtype=x.dtype)
        x_t = path.interpolate(x, eps, t)
        seen = x_t.detach()
        with evaluating(self.teacher_module):
            null = needs_null(c.method, c.guidance_scale, batch.condition)
            teacher = ask(self.teacher, seen, t, batch.condition, null=null)
        fake = None if self.fake is None else self.fake.epsilon(seen, t, batch.condition)
        r = residual(c.method, teacher, eps, c.guidance_scale, fake)
        w = weights(
            c.weight or ("dmd" if c.method == "dmd" else "sigma2"), t, path, teacher.epsilon(c.guidance_scale) - eps
        )
        r, w, dropped = safe(r, w, c.clip)
        if dropped.all():
            raise DivergedError(f"phase 'student': no item of {len(x)} has a finite gradient")
        g = expand(w, r) * r
        logs = {
            "gradient": g.square().flatten(1).mean(1).sqrt().mean(),
            "mean_gradient": g.mean(0).square().mean().sqrt(),  # of the batch: falls as the laws come together
            "dropped": dropped.double().mean(),
        }
        loss = self._pull(x, r, w, t).mean()
        if c.gan is not None:
            with evaluating(self.fake_module):
                verdict = looks_real(self._judge(x_t, t, batch.condition)[1]).mean()
            logs["gan"] = verdict.detach()
            loss = loss + c.gan.generator_weight * verdict
        if c.regression_weight is not None:
            error = self._regression(batch)
            logs["regression"] = error.detach()
            loss = loss + c.regression_weight * error
        return Loss(loss, logs)

    def _pull(self, x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Tensor:
        c, path = self.config, self.teacher.interpolant
        if c.form == "gradient":
            return gradient_loss(x, r, w, c.reduction)
        target = moving_target(x, r, t, path)
        if c.space == "image":
            with torch.no_grad():
                target = self._decode(target)
            x = self._decode(x)
        return reconstruction_loss(x, target, w, t, path, c.reduction)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._vae[0]
        return vae.decode(unstandardise(vae, latents).to(vae.dtype), return_dict=False)[0]

    def _regression(self, batch: Batch) -> Tensor:
        if "eps" not in batch.fields:
            raise ValueError(
                f"regression_weight={self.config.regression_weight} needs pairs, fields eps and x0; the data gives "
                f"{sorted(batch.fields)}"
            )
        time, timestep = (v[0].to(batch.x0.device).expand(len(batch.x0)) for v in self.steps)
        made = self.student(batch.fields["eps"], time, batch.condition, timestep=timestep).sample
        return mean_of_squares(made - batch.x0).mean()

    # -- the fake network -----------------------------------------------------------------------------------------

    def _fake_loss(self, batch: Batch, rng: ItemRNG) -> Loss:
        c, path = self.config, self.teacher.interpolant
        assert self.fake is not None
        with torch.no_grad(), evaluating(self.student_module):
            x = self._generate(batch, rng)
        t = self.fake.settings.times.draw(rng)
        eps = rng.normal(x.shape[1:], dtype=x.dtype)
        x_t, condition = path.interpolate(x, eps, t), batch.condition
        if c.gan is None:
            return Loss(self.fake.errors(self.fake(x_t, t, condition), x, eps).mean(), {})
        noise = rng.normal(x.shape[1:], dtype=x.dtype)
        both = torch.cat((x_t, path.interpolate(batch.x0.to(x), noise, t)))
        twice = Condition.cat([condition] * 2) if condition.values else condition
        prediction, logits = self._judge(both, t.repeat(2), twice)
        error = self.fake.errors(prediction.index(slice(len(x))), x, eps).mean()
        made, real = logits.chunk(2)
        verdict = (looks_generated(made) + looks_real(real)).mean()
        logs = {"denoising": error.detach(), "discriminator": verdict.detach()}
        return Loss(error + c.gan.fake_weight * verdict, logs)

    def _judge(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Tensor]:
        assert self.fake is not None and self.head is not None
        prediction, features = self.fake.features(x_t, t, condition, self.head.config["at"])
        return prediction, self.head(features)


def _steps(student: Denoiser, timesteps: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Times and native timesteps of the generator's steps, ``(K,)`` each."""
    path = student.interpolant
    if timesteps is None:
        times = torch.ones(1, dtype=torch.float64)
    else:
        times = path.time(torch.tensor(timesteps, dtype=torch.float64))
        times = times.where((times - 1).abs() > 1e-6, 1.0)  # timesteps are rounded to float32
    if not bool(((times > 0) & (times <= 1)).all()):
        first, last = (path.timestep(torch.tensor(t, dtype=torch.float64)).item() for t in (0.0, 1.0))
        raise ValueError(f"timesteps={list(timesteps or [])}: accepted are those above {first:g} up to {last:g}")
    if student.prediction_type == "epsilon" and bool((path.alpha(times) == 0).any()):
        raise ValueError(
            "timesteps: an epsilon model says nothing of the clean sample at its last time, where alpha = 0; start "
            "below that, or use a student that predicts v or a flow"
        )
    return times, path.timestep(times)
