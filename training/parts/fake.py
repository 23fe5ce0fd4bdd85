"""The network that follows a generator's own samples: what distribution matching compares the teacher with."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal, TypeAlias

from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser, Prediction
from genkit.training.adapters import add_adapter, using
from genkit.training.parts.losses import evaluating, mean_of_squares, wide
from genkit.training.parts.score_distillation import ask
from genkit.training.parts.times import TimeLaw, Uniform


class _Fake(BaseModel):
    """``repeats``: updates per update of the generator.

    ``weighting``: the loss is the squared error of ``epsilon``, of ``velocity``, or ``(alpha^2 / sigma^2 + 1 /
    sigma_data^2)`` times that of the clean sample (``edm``). ``times``: the law of the times that are trained.
    ``guidance_scale``: with which the generator's loss reads it. ``optimizer``: settings that replace the run's.
    """

    model_config = ConfigDict(extra="forbid")
    repeats: int = Field(5, ge=1)
    weighting: Literal["epsilon", "velocity", "edm"] = "epsilon"
    sigma_data: float | None = Field(None, gt=0)
    times: TimeLaw = Uniform(low=0.001, high=0.999)
    guidance_scale: float = Field(1.0, ge=0)
    optimizer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _scaled(self):
        if (self.sigma_data is not None) != (self.weighting == "edm"):
            raise ValueError(
                f"sigma_data={self.sigma_data} with weighting={self.weighting!r}: edm needs a number, the others none"
            )
        return self


class FullFake(_Fake):
    """A copy of the teacher, all weights trained."""

    kind: Literal["full"] = "full"


class LoraFake(_Fake):
    """A low-rank update of the teacher's own network, which stays frozen; settings as those of ``adapter``."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(16, gt=0)
    target_modules: list[str] | None = None


FakeSettings: TypeAlias = Annotated[FullFake | LoraFake, Field(discriminator="kind")]


class FakeModel:
    """A network, equal to ``teacher`` at first, that is fitted to a generator's samples.

    Attributes:
        module: what is trained; with a LoRA the teacher's own network, of which the LoRA alone is trainable.
        is_adapter: whether it is a LoRA.

    Raises:
        ValueError: LoRA targets that match no layer.
    """

    adapter = "fake"

    def __init__(self, settings: FullFake | LoraFake, teacher: Denoiser):
        self.settings, self.is_adapter = settings, isinstance(settings, LoraFake)
        if self.is_adapter:
            add_adapter(teacher, self.adapter, settings)
            self.denoiser = teacher
        else:
            self.denoiser = teacher.with_network(copy.deepcopy(teacher.module).requires_grad_(True))
        self.module = self.denoiser.module

    def in_use(self) -> AbstractContextManager:
        """Within, ``denoiser`` is the fake model and not the teacher."""
        return using(self.denoiser, self.adapter) if self.is_adapter else nullcontext()

    def remove(self) -> None:
        """Take a LoRA off the teacher's network again."""
        if not self.is_adapter:
            return
        for layer in self.module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(self.adapter)
        for module in self.module.modules():
            getattr(module, "peft_config", {}).pop(self.adapter, None)

    def epsilon(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Its noise prediction, guided, without gradient and dropout, in float32 at least."""
        scale = self.settings.guidance_scale
        with self.in_use(), evaluating(self.module):
            null = scale != 1 and bool(condition.values)
            return ask(self.denoiser, x_t, t, condition, null=null).epsilon(scale)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Its prediction, to be trained."""
        with self.in_use():
            return self.denoiser(x_t, t, condition)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, at) -> tuple[Prediction, list[Tensor]]:
        """The prediction with the outputs of the sub-modules named in ``at``."""
        with self.in_use():
            return self.denoiser.features(x_t, t, condition, at)

    def errors(self, prediction: Prediction, x: Tensor, eps: Tensor) -> Tensor:
        """The loss ``(B,)`` of a prediction at ``alpha x + sigma eps``, the mean over elements."""
        path, t = self.denoiser.interpolant, prediction.t.to(x.dtype)
        if self.settings.weighting == "epsilon":
            return mean_of_squares(wide(prediction.epsilon) - eps)
        if self.settings.weighting == "velocity":
            return mean_of_squares(wide(prediction.velocity) - path.velocity(x, eps, t))
        assert self.settings.sigma_data is not None
        weight = (path.alpha(t) / path.sigma(t)) ** 2 + self.settings.sigma_data**-2
        return weight * mean_of_squares(wide(prediction.sample) - x)
