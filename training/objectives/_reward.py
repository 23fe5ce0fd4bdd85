"""What the strategies share that differentiate a reward of the model's own samples; each says how far the gradient
goes."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from genkit.denoisers.base import Denoiser
from genkit.guidance.base import Guider
from genkit.guidance.cfg import CFG
from genkit.latents import compression
from genkit.rewards.base import Prompts
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role
from genkit.training.parts.judge import Clamp, Component, Judge
from genkit.training.parts.reference import Reference
from genkit.training.parts.reward_loss import LinearLoss, RewardLoss
from genkit.training.parts.rollout import Grid, Rollout, schedule, walker
from genkit.training.parts.trends import distance_from_start

logger = logging.getLogger("genkit.training")


class RewardObjectiveConfig(ObjectiveConfig):
    """Settings of every strategy.

    ``rewards``: what is raised, a weighted sum. ``held_out``: what is only watched. ``normalise``: ``running``
    standardises each by its own mean and deviation so far instead of by constants. ``loss``: of the sum.
    ``clamp``: of pictures to [0, 1]: ``straight_through`` passes the gradient of saturated pixels, ``hard`` does not.
    ``micro_batch``: how many samples are decoded and judged at a time; unset is all.

    ``num_inference_steps``, ``guidance_scale``, ``detach_unconditional``, ``noise_scale``, ``recompute``: of the
    rollout, see :class:`genkit.training.parts.rollout.Rollout`; what ``recompute`` is by default depends on the
    strategy. ``scheduler``: whose times it visits, by default those of the pipeline's. ``prior_weight``: of the squared
    distance from the base model's predictions.

    ``stop_at_reward``: training ends once the sum's mean over the last ten steps is there. ``trend_window``: steps over
    which trained and held-out rewards are compared; a warning says when one rises and another falls.
    """

    rewards: list[Component] = Field(min_length=1)
    held_out: list[Component] = []
    normalise: Literal["constants", "running"] = "constants"
    loss: RewardLoss = LinearLoss()
    clamp: Clamp = "straight_through"
    micro_batch: int | None = Field(None, ge=1)
    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(1.0, ge=0)
    detach_unconditional: bool = False
    noise_scale: float = Field(0.0, ge=0)
    scheduler: str | None = None
    recompute: bool | None = None
    prior_weight: float = Field(0.0, ge=0)
    stop_at_reward: float | None = None
    trend_window: int = Field(50, ge=4)

    @field_validator("rewards", "held_out", mode="before")
    @classmethod
    def _one(cls, value):
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self):
        if self.detach_unconditional and self.guidance_scale == 1:
            raise ValueError("detach_unconditional=True: at guidance_scale=1 there is no unconditional branch")
        keys = [c.key for c in (*self.rewards, *self.held_out)]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"rewards and held_out name {twice} more than once; give each a label of its own")
        constant = [c.key for c in self.rewards if {"mean", "std"} & c.model_fields_set]
        if constant and self.normalise == "running":
            raise ValueError(f"normalise='running' takes the place of mean and std, which {constant} set")
        return self


class RewardObjective(Objective):
    """Raise ``E r(decode(x_0), prompt)`` of samples ``x_0`` that the model itself draws; a subclass says how.

    Decoder and rewards are differentiated by themselves first, so that their graph and the network's are never held
    together::

        g = d loss(r(decode(x_0))) / d x_0          d loss / d theta = g . d x_0 / d theta

    A sample whose reward is not finite is dropped: it counts in the batch, with loss and gradient 0.

    Logged at every step, as means over its samples:

    ====================== ==========================================================================================
    ``loss``               what the setting ``loss`` makes of ``reward``, plus ``prior_weight`` times ``prior``; under
                           LeapAlign each sample's times its similarity weight
    ``reward``             the weighted sum of the trained ones, each as ``(r - mean) / std``
    ``reward/<label>``     every trained and held-out one, as it is
    ``hinge_active``       share of samples below the threshold of ``loss: {kind: hinge}``
    ``dropped``            how many samples of a micro-batch had no finite reward
    ``diversity``          rms distance of pictures from others of the same prompt, where a micro-batch has such
    ``distance_from_base`` norm of the change of the weights since training began; of a LoRA, of the change it makes
    ``prior``              squared distance from the base model's predictions, under ``prior_weight``
    ``d_0``, ``d_j``       LeapAlign: how far off the trajectory the last leap lands, and those before it
    ``similarity_weight``  LeapAlign: ``1 / sum max(d, tau)``
    ====================== ==========================================================================================

    Raises:
        ValueError: a reward without gradient, or that cannot take the pictures; a scheduler that clips; a model that
            says nothing of the clean sample where sampling begins.
        DivergedError: at a step no sample had a finite reward.
    """

    Config: ClassVar[type[RewardObjectiveConfig]] = RewardObjectiveConfig
    needs_samples = False
    adapter = "lora"
    shards = False  # calls with and without gradient alternate, and rewards would be cut, too
    recomputes: bool = True  # by default, the calls of the network that gradients pass

    def __init__(self, config: Any, student: Denoiser, teacher: Denoiser | None = None, *, pipe: Any):
        super().__init__(config, student, teacher)
        c: RewardObjectiveConfig = config
        self.pipe = pipe
        self.walker = walker(pipe.scheduler, c.scheduler)
        self._grids: dict[tuple[int, ...], Grid] = {}
        self.judge = Judge(
            c.rewards,
            c.held_out,
            c.loss,
            normalise=c.normalise,
            vae=pipe.components.get("vae"),
            clamp=c.clamp,
            micro_batch=c.micro_batch,
            window=c.trend_window,
        )
        self.base = Reference(student, decay=1.0) if c.prior_weight else None
        self.distance = distance_from_start(student)

    @classmethod
    def make(cls, config: Any, student: Denoiser, teacher: Denoiser | None, pipe: Any) -> "RewardObjective":
        return cls(config, student, teacher, pipe=pipe)

    @property
    def roles(self) -> Mapping[str, Role]:
        # Running statistics stay outside of these, so that checkpoints hold them.
        roles = dict(super().roles) | {"rewards": Role(self.judge.reward.components, trains=False)}
        if len(self.judge.held_out):
            roles["held_out"] = Role(self.judge.held_out, trains=False)
        return roles | (self.base.roles if self.base is not None else {})

    @abstractmethod
    def estimate(self, run: Rollout, x: Tensor, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        """The losses of a batch, given a rollout and the noise ``x`` ``(B, ...)`` that it starts from."""

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        # No dropout, neither here nor where calls are computed again in the backward.
        self.eval()
        c = self.config
        x = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        run = Rollout(
            self.student,
            self.grid(tuple(x.shape[1:])),
            batch.condition,
            guidance_scale=c.guidance_scale,
            detach_unconditional=c.detach_unconditional,
            noise_scale=c.noise_scale,
            recompute=self.recomputes if c.recompute is None else c.recompute,
            base=self.base,
            rng=rng,
        )
        yield from self.estimate(run, x, batch, rng)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        self.grid(shape)
        channels, *sides = shape
        vae = self.pipe.components.get("vae")
        if vae is not None:
            channels, sides = vae.config.out_channels, [compression(vae) * side for side in sides]
        self.judge.check_size((channels, *sides))

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """The calls of a rollout for samples of ``shape``."""
        if shape not in self._grids:
            schedule(self.student, self.pipe, self.walker, self.config.num_inference_steps, shape)
            self._grids[shape] = Grid(self.walker.times.clone(), self.walker.timesteps.clone())
        return self._grids[shape]

    def surrogate(self, x: Tensor, gradient: Tensor, loss: Tensor, run: Rollout, logs: dict[str, Tensor]) -> Loss:
        """What has the value ``loss`` and the gradient of ``gradient . x``, each with the prior's beside it."""
        dot = (x * gradient.to(x)).sum()
        value = loss.detach() + (dot - dot.detach())
        if run.penalty is not None:
            prior, run.penalty = run.penalty.mean(), None
            value, logs = value + self.config.prior_weight * prior, logs | {"prior": prior.detach()}
        return Loss(value, logs)

    def judged(self, x: Tensor, run: Rollout, batch: Batch, *, watch: bool = True) -> Loss:
        """The loss of clean samples ``x`` ``(B, ...)`` that carry a graph: the mean over the batch."""
        seen = self.judge(x, batch.prompts, watch=watch)
        logs = seen.logs | {"distance_from_base": self.distance()} if watch else {}
        return self.surrogate(x, seen.gradient / len(x), seen.loss.mean(), run, logs)

    def updated(self, phase: Phase) -> None:
        warning = self.judge.updated()
        if warning:
            logger.warning(warning)

    @property
    def done(self) -> str | None:
        wanted = self.config.stop_at_reward
        reached = None if wanted is None else self.judge.trends.recent(10)
        if reached is None or reached < wanted:
            return None
        return f"the mean reward of the last ten steps is {reached:.4g}, stop_at_reward={wanted:g}"

    def guider(self) -> Guider | None:
        scale = self.config.guidance_scale
        return CFG(guidance_scale=scale) if scale != 1 else None

    def measures(self, pixels: Tensor, prompts: Prompts | None) -> dict[str, float]:
        return self.judge.measures(((pixels + 1) / 2).clamp(0, 1), prompts)
