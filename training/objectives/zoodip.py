"""ZOODiP: a new token of a quantised model, learned without back-propagation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from genkit import int8, textual_inversion
from genkit.denoisers.base import Condition, Denoiser
from genkit.interpolants import DiscreteVP
from genkit.rewards.base import Prompts
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role, shared
from genkit.training.parts.losses import wide
from genkit.training.parts.zeroth_order import Projection, Subspace, estimate


class SubspaceConfig(ObjectiveConfig):
    """Settings of :class:`genkit.training.parts.zeroth_order.Subspace`: ``retain_top`` is the paper's projection,
    ``drop_tail`` that of its released code."""

    projection: Projection = "retain_top"
    window: int = Field(128, ge=2)
    noise: float = Field(1e-3, gt=0, lt=1)
    release_every: int | None = Field(None, ge=2)


class ZOODiPConfig(ObjectiveConfig):
    """Settings of :class:`ZOODiP`.

    ``token``: the new word; of a class-conditional network the number of the class that is learned anew.
    ``initializer``: the word it starts from. ``templates``: texts with ``{}`` in the token's place, one at random for
    each picture; unset, the data's own prompts, which must contain the token.
    ``num_directions``, ``step``, ``central``: of :func:`genkit.training.parts.zeroth_order.estimate`. ``directions``:
    standard ``normal``, as in the paper, or random ``signs`` (SPSA).
    ``t_min``, ``t_max``: between which noise levels, in parts of the 1000 timesteps of Stable Diffusion.
    ``quantization``: of all that is frozen, see :func:`genkit.int8.quantize`.
    """

    token: str = Field(min_length=1)
    initializer: str | None = None
    templates: list[str] | None = Field(None, min_length=1)
    directions: Literal["normal", "signs"] = "normal"
    num_directions: int = Field(2, ge=1)
    step: float = Field(1e-3, gt=0)
    central: bool = False
    subspace: SubspaceConfig | None = SubspaceConfig()
    t_min: float = Field(0.5, ge=0, lt=1)
    t_max: float = Field(0.9, gt=0, le=1)
    quantization: Literal["none", "int8", "torchao", "bitsandbytes"] = "int8"

    @field_validator("token", mode="before")
    @classmethod
    def _numbered(cls, value):
        """The number of a class is a number in YAML and on the command line."""
        return str(value) if type(value) is int else value

    @field_validator("templates")
    @classmethod
    def _placed(cls, value):
        bad = [t for t in value or () if t.count("{}") != 1]
        if bad:
            raise ValueError(f"{bad[0]!r} must have {{}} once, where the token stands")
        return value

    @model_validator(mode="after")
    def _ordered(self):
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min={self.t_min} must be below t_max={self.t_max}")
        return self


class ZOODiP(Objective):
    """Textual inversion by forward passes alone, of a network, text encoders and autoencoder in eight bits.

    With the mean squared error ``l(theta)`` of the network's prediction, under one noise and time for all evaluations
    of a step, and ``n`` directions ``e_i``, of ``E e_i e_i^T = I`` and the same on every process::

        g = P sum_i (l(theta + mu e_i) - l(theta)) / mu e_i / (n sqrt((d' + n - 1) / n))

    ``P`` projects on the subspace of recent values of the token, ``d'`` is the dimension less what ``P`` takes away.
    Times are uniform on ``[t_min, t_max)``, on other paths than Stable Diffusion's on the interval of the same ratios
    of noise to signal. Memory is that of sampling, beside ``window`` tokens. The optimiser is the run's: the paper's
    is Adam with an ``eps`` of 1e-3, without clipping.

    A text-to-image pipeline gets a new word, in each of its text encoders; a class-conditional network a new vector for
    a class, in each of its tables. Samples in the course of training are of it. What is exported is that alone:
    ``embedding/``, for :func:`genkit.textual_inversion.load` or Diffusers' ``load_textual_inversion``.

    Source: "Efficient personalization of quantized diffusion model without backpropagation", arXiv 2503.14868.

    Raises:
        ValueError: a token that exists already, an initializer that is no single token, a package for ``quantization``
            that is not installed, prompts without the token.
    """

    Config = ZOODiPConfig
    needs_condition = False
    shards = False

    def __init__(
        self,
        config: ZOODiPConfig,
        student: Denoiser,
        teacher: Denoiser | None = None,
        *,
        pipe: Any,
    ):
        super().__init__(config, student, teacher)
        self.pipe, self.texts = pipe, bool(textual_inversion.text_encoders(pipe))
        if not self.texts and config.templates is not None:
            raise ValueError("objective.templates: the pipeline has no text encoder; leave them out")
        if self.texts and config.templates and any(config.token in t for t in config.templates):
            raise ValueError(f"objective.templates name the token {config.token!r}, in whose place they must have {{}}")
        self.embedding = textual_inversion.insert(pipe, student, token=config.token, initializer=config.initializer)
        encoders = [encoder for _, encoder in textual_inversion.text_encoders(pipe).values()]
        vae = pipe.components.get("vae")
        for module in (student.module, *encoders, *([] if vae is None else [vae])):
            int8.quantize(module.requires_grad_(False), config.quantization)
        d, s = len(self.embedding.flat), config.subspace
        self.subspace = None if s is None else Subspace(d, s.window, s.noise, s.projection, s.release_every)

    @classmethod
    def make(cls, config: Any, student: Denoiser, teacher: Denoiser | None, pipe: Any) -> "ZOODiP":
        return cls(config, student, teacher, pipe=pipe)

    @property
    def roles(self) -> Mapping[str, Role]:
        return {"student": Role(self.student_module, trains=False), "embedding": Role(self.embedding, ema=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("embedding", trains=("embedding",)),)

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        self.eval()  # dropout would differ from one evaluation to the next
        c, path = self.config, self.student.interpolant
        t, timestep = self._times(rng)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        z = path.interpolate(batch.x0, eps, t)
        target = wide(path.target(self.student.prediction_type, batch.x0, eps, t))
        asked = self._asked(batch.prompts, rng)

        def error(theta: Tensor) -> Tensor:
            with self.embedding.at(theta):
                raw = self.student(z, t, self._condition(asked, len(z)), timestep=timestep).raw
            return (wide(raw) - target).square().mean()

        theta, n = self.embedding.flat, c.num_directions
        row = shared(batch, rng)
        signs = c.directions == "signs"
        directions = (2 * row.integers(2, (n, len(theta))) - 1 if signs else row.normal((n, len(theta))))[0].to(theta)
        gradient, value = estimate(error, theta.detach(), directions, c.step, central=c.central)
        removed = 0 if self.subspace is None else self.subspace.removed
        gradient = gradient / ((len(theta) - removed + n - 1) / n) ** 0.5
        if self.subspace is not None:
            gradient = self.subspace.project(gradient)
        slope = (theta * gradient).sum()
        logs = {"estimate_norm": gradient.norm(), "removed": torch.tensor(float(removed), device=value.device)}
        yield Loss(value + slope - slope.detach(), logs)

    def updated(self, phase: Phase) -> None:
        if self.subspace is not None:
            self.subspace.push(self.embedding.flat.detach())

    def _times(self, rng: ItemRNG) -> tuple[Tensor, Tensor]:
        """``t`` and the native timestep of each item."""
        c, path = self.config, self.student.interpolant
        if isinstance(path, DiscreteVP):
            n = path.num_train_timesteps
            low = min(round(c.t_min * n), n - 1)
            timestep = low + rng.integers(max(round(c.t_max * n) - low, 1))
            return path.time(timestep).float(), timestep
        ends = torch.tensor([c.t_min, c.t_max], dtype=torch.float64)
        low, high = path.time_at(_STABLE_DIFFUSION.alpha(ends), _STABLE_DIFFUSION.sigma(ends)).tolist()
        t = low + (high - low) * rng.uniform()
        return t, path.timestep(t)

    def own_condition(self, asked: Prompts | None, rng: ItemRNG) -> Condition:
        return self._condition(self._asked(asked, rng), len(rng))

    def _asked(self, prompts: Prompts | None, rng: ItemRNG) -> list[str]:
        """Texts with the token, for text-to-image networks."""
        c = self.config
        if not self.texts:
            return []
        if c.templates is not None:
            picked = rng.integers(len(c.templates)).tolist()
            return [c.templates[i].replace("{}", c.token) for i in picked]
        if prompts is None or any(not isinstance(p, str) or c.token not in p for p in prompts):
            raise ValueError(
                f"the data's prompts do not contain the token {c.token!r}; set objective.templates, such as "
                "['a photo of {}'], or put it into them"
            )
        return list(prompts)  # type: ignore[arg-type]

    def _condition(self, asked: list[str], n: int) -> Condition:
        if self.texts:
            return self.student.encode(self.pipe, prompt=asked)
        return self.student.encode(self.pipe, class_labels=[int(self.config.token)] * n)


_STABLE_DIFFUSION = DiscreteVP(
    (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
)
