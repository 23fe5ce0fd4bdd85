"""The sections of a recipe: what each setting is called, its default, and what it accepts."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from genkit.sara import RankTarget
from genkit.step_annealing import StepAnnealer, as_written


def _steps(value: Any) -> int | StepAnnealer:
    from genkit.pipelines.by_name import parse_steps

    steps = parse_steps(value) if isinstance(value, str) else value
    if isinstance(steps, StepAnnealer) or type(steps) is int and steps >= 1:
        return steps
    raise ValueError(
        "expected a whole number of at least 1, or of a diffusion head how they fall, as linear:hi=50,lo=5 or "
        "linear:budget=400"
    )


Steps = Annotated[
    int | StepAnnealer,
    PlainValidator(_steps),
    PlainSerializer(as_written),
]


class Section(BaseModel):
    """A part of the settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(BaseModel):
    """A member of a family by name, and that member's own settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Scheduler(Named):
    """A scheduler by its class name, of Diffusers or genkit, and its arguments."""

    name: str = "FlowMatchEulerDiscreteScheduler"


class Model(BaseModel):
    """What is trained: a new network, or one from a Diffusers pipeline folder.

    ``network``: name of a file in ``genkit.networks``, whose constructor's arguments stand beside it; ``scheduler``
    (``{name: class, ...its arguments}``) then fixes the path and what the network predicts, and is exported with it.
    ``components``: what stands beside a new network in its pipeline, by name: the folder of a model, or of a pipeline
    that has one: ``{vqvae: outputs/digits/tokenizer_fvq/pipeline}``. ``pretrained``: a pipeline folder, which brings
    all of that.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())
    network: str | None = None
    pretrained: str | None = None
    scheduler: Scheduler = Scheduler()
    components: dict[str, str] = {}

    @model_validator(mode="after")
    def _one(self):
        if (self.network is None) == (self.pretrained is None):
            raise ValueError("exactly one of network and pretrained must be set")
        if self.pretrained is not None and (self.model_extra or self.model_fields_set - {"pretrained", "network"}):
            extra = sorted(set(self.model_extra or {}) | (self.model_fields_set - {"pretrained"}))
            raise ValueError(f"{', '.join(extra)} cannot be set with pretrained, which brings its own")
        return self

    @model_serializer(mode="wrap")
    def _given(self, handler):
        """Without what cannot be set together, so that what a run writes can be run again."""
        values = handler(self)
        if self.pretrained is not None:
            return {"pretrained": self.pretrained}
        return {k: v for k, v in values.items() if k != "pretrained" and (k != "components" or v)}

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Adapter(Section):
    """Which weights train: all (``full``), or low-rank updates (``lora``) beside the frozen ones; or see :class:`Sara`.

    What a recipe without this section trains is for the method to say: all of them, but by a reward a LoRA.

    ``target_modules`` are name endings as in PEFT; unset means the attention's projections.
    """

    kind: Literal["full", "lora"] = "full"
    rank: int = Field(16, ge=1)
    alpha: float = Field(16, gt=0)
    target_modules: list[str] | None = None


class Sara(Section):
    """The smallest weights train, in place (:func:`genkit.sara.add_sara`).

    ``threshold``: those with ``|w|`` below it, 2e-3 where ``num_params`` is not set either: as many of the smallest
    weights instead. ``target_modules``, ``exclude_modules``: endings of layers' names. ``lambda_rank``: strength of the
    nuclear norm of the selected weights, or by ``rank_target`` of their change, of one layer a step, drawn at random.
    It is in units of the loss: the default is the published one, for a mean over a sample's entries; of a method whose
    loss is the sum of them, as most here, that is ``5e-4`` times their number. Its gradient is added before
    ``max_grad_norm`` cuts the sum. ``progressive_ratio``: after this share of the steps only those train on that are
    still below the threshold; ``null``: all of them to the end.
    """

    kind: Literal["sara"]
    threshold: float | None = Field(None, gt=0)
    num_params: int | None = Field(None, ge=1)
    target_modules: list[str] | None = None
    exclude_modules: list[str] = []
    lambda_rank: float = Field(5e-4, ge=0)
    rank_target: RankTarget = "weight"
    progressive_ratio: float | None = Field(0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_rule(self):
        if self.threshold is not None and self.num_params is not None:
            raise ValueError(f"threshold={self.threshold} and num_params={self.num_params} both select; set one")
        if self.lambda_rank == 0 and "rank_target" in self.model_fields_set:
            raise ValueError(f"rank_target={self.rank_target!r} needs lambda_rank above 0")
        return self


class Ema(Section):
    """Averages of the weights, ``a <- a + (1 - d) (w - a)`` for each decay; the first is sampled and exported.

    ``ema: null`` keeps none.
    """

    decays: list[float] = [0.999]

    @field_validator("decays")
    @classmethod
    def _range(cls, decays):
        if any(not 0 <= d < 1 for d in decays) or len(set(decays)) < len(decays):
            raise ValueError("decays must be distinct numbers in [0, 1)")
        return decays


class Sampling(Section):
    """Periodic samples: a fixed set of noise and conditions, drawn with the averaged weights every ``every`` steps.

    ``evaluate``: also compare ``num_samples`` of them with as many real ones, by ``genkit.eval``'s extractor of this
    name.
    """

    every: int | None = Field(None, ge=1)
    num_samples: int = Field(64, ge=1)
    num_inference_steps: Steps = 4
    evaluate: str | None = None


class Evaluation(Section):
    """Metrics every ``every`` steps: ``num_samples`` samples with the averaged weights, against a reference.

    ``extractor`` and ``metrics`` are written as for ``genkit eval run`` (``inception:weights=FILE``,
    ``kid:subsets=0``); without ``metrics``, all usual ones that are possible. ``reference`` is a folder, ``.npz`` or
    saved statistics; unset, as many records of the data. All processes share the work. Results are files in
    ``evaluations``.
    """

    every: int | None = Field(None, ge=1)
    num_samples: int = Field(1000, ge=2)
    num_inference_steps: Steps = 4
    batch_size: int = Field(64, ge=1)
    extractor: str | None = None
    metrics: list[str] | None = None
    reference: str | None = None

    @field_validator("metrics", mode="before")
    @classmethod
    def _split(cls, value):
        from genkit.eval.by_name import split

        return split(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _measurable(self):
        if self.every is not None and self.extractor is None:
            raise ValueError(f"every={self.every} needs an extractor, as inception:weights=FILE or digits")
        return self


class Health(Section):
    """When to warn: a gradient norm this many times its running median; samples with this much more of their values
    outside the data's range than the data has at its ends; samples with less than this share of the data's variance.

    ``patience`` samplings in a row of the last two kinds stop the run.
    """

    enabled: bool = True
    grad_norm_spike: float = Field(10.0, gt=1)
    saturation: float = Field(0.25, gt=0, le=1)
    variance_collapse: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(3, ge=1)


class Rounds(Section):
    """Self-play (:mod:`genkit.training.rounds`): ``count`` rounds, each against the best student of the one before.

    A round generates ``num_fakes`` samples of its reference (unset: the method draws them itself), trains a student for
    every combination of ``grid`` (settings of the objective, each with the values to try), and keeps the averaged
    weights that score best at any multiple of ``evaluate_every`` steps: Frechet distance of ``num_samples`` samples
    from the data by ``extractor`` of ``genkit.eval``, unset the energy distance in the network's space.
    """

    count: int = Field(4, ge=1)
    grid: dict[str, list[Any]] = {}
    num_fakes: int | None = Field(50_000, ge=1)
    num_samples: int = Field(10_000, ge=2)
    num_inference_steps: int = Field(50, ge=1)
    batch_size: int = Field(64, ge=1)
    evaluate_every: int = Field(ge=1)
    extractor: str | None = None


class Distill(Section):
    """What makes a recipe one of ``genkit distill``: the ``method``'s name there, and the classes of pipelines whose
    models it is made for; none for all that no other recipe of the method is made for.
    """

    method: str
    pipelines: list[str] = []
