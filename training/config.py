"""The settings of a run: YAML, dotted overrides, and errors that say which setting is wrong and what is accepted."""

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from yaml import YAMLError

from genkit.data.base import Source
from genkit.quantizers.base import Quantizer
from genkit.registry import lookup, members, unknown
from genkit.sara import RankTarget
from genkit.step_annealing import StepAnnealer, as_written
from genkit.training.objectives.base import Objective


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


class TrainConfig(Section):
    """Settings of a training run. Names are those of Diffusers' training scripts where these have the setting.

    ``global_batch_size`` counts all processes and accumulation steps, so that a run does not depend on either.
    ``lr_hold_ratio``: of the steps after the warm-up, how many ``hold_linear`` and ``hold_cosine`` keep the full rate,
    0.3 where unset.
    ``frozen_dtype``: of weights that never train: text encoders, teacher, and under a LoRA or SaRA the network itself;
    what trains, and an autoencoder, stay in float32.
    ``resume``: ``latest``, a ``checkpoint-<step>`` folder, or nothing to start anew.
    """

    output_dir: Path
    seed: int = 0
    model: Model
    adapter: Annotated[Adapter | Sara, Field(discriminator="kind")] = Adapter()
    teacher: str | None = None
    objective: Named
    data: Named
    optimizer: Named = Named(name="AdamW", lr=1e-4)  # type: ignore[call-arg]
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    lr_final_ratio: float = Field(0.0, ge=0, le=1)
    lr_hold_ratio: float | None = Field(None, ge=0, lt=1)
    global_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_train_steps: int = Field(ge=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    allow_tf32: bool = False
    dataloader_num_workers: int = Field(0, ge=0)
    ema: Ema = Ema()
    checkpointing_steps: int = Field(500, ge=1)
    checkpoints_total_limit: int | None = Field(None, ge=1)
    resume: str | None = None
    report_to: list[str] = []
    logging_dir: str = "logs"
    tracker_project_name: str = "genkit"
    logging_steps: int = Field(10, ge=1)
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    health: Health = Health()
    rounds: Rounds | None = None
    distill: Distill | None = None

    @model_validator(mode="before")
    @classmethod
    def _adapted(cls, values):
        objective = values.get("objective") if isinstance(values, dict) else None
        name = objective.get("name") if isinstance(objective, dict) else getattr(objective, "name", None)
        known = members("genkit.training.objectives", Objective)
        if name in known and "adapter" not in values:
            return {**values, "adapter": {"kind": known[name].adapter}}
        adapter = values.get("adapter") if isinstance(values, dict) else None
        if isinstance(adapter, dict) and "kind" not in adapter:
            return {**values, "adapter": {"kind": "full", **adapter}}
        return values

    @field_validator("report_to", mode="before")
    @classmethod
    def _several(cls, value):
        return [value] if isinstance(value, str) else value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _of_yaml(cls, value):
        return "no" if value is False else value  # what YAML takes an unquoted no for

    @field_validator("ema", mode="before")
    @classmethod
    def _none(cls, value):
        return {"decays": []} if value is None or value is False else value

    @field_validator("lr_scheduler")
    @classmethod
    def _known(cls, value):
        from genkit.training.optimizers import LR_SCHEDULERS

        if value not in LR_SCHEDULERS:
            raise ValueError(unknown("lr_scheduler", value, LR_SCHEDULERS))
        return value

    @model_validator(mode="after")
    def _divides(self):
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}"
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} needs a schedule with warm-up, such as "
                "lr_scheduler=constant_with_warmup"
            )
        if self.lr_hold_ratio is not None and not self.lr_scheduler.startswith("hold_"):
            raise ValueError(
                f"lr_hold_ratio={self.lr_hold_ratio} needs lr_scheduler=hold_linear or hold_cosine, not "
                f"{self.lr_scheduler}"
            )
        return self

    def objective_class(self) -> type[Objective]:
        return lookup("genkit.training.objectives", Objective, self.objective.name, setting="objective.name")

    def objective_config(self) -> BaseModel:
        return validate(self.objective_class().Config, self.objective.settings, "objective")

    def source_class(self) -> type[Source]:
        return lookup("genkit.data", Source, self.data.name, setting="data.name")

    def source_config(self) -> BaseModel:
        return validate(self.source_class().Config, self.data.settings, "data")

    def check(self) -> "TrainConfig":
        """Everything that can be known to be wrong before a network or a data set is made."""
        from genkit.training import build, optimizers

        cls = self.objective_class()
        self.objective_config()
        self.source_config()
        optimizers.check(self.optimizer)
        build.check_model(self.model)
        if cls.needs_teacher == "required" and self.teacher is None:
            raise ValueError(f"teacher=None: objective={self.objective.name!r} needs the folder of a teacher pipeline")
        if cls.needs_teacher == "never" and self.teacher is not None:
            raise ValueError(f"teacher={self.teacher!r}: objective={self.objective.name!r} takes no teacher")
        if cls.full_precision and self.frozen_dtype != "float32":
            raise ValueError(
                f"frozen_dtype={self.frozen_dtype!r}: objective={self.objective.name!r} learns from small "
                "differences of large numbers and needs frozen_dtype=float32"
            )
        if cls.full_precision and self.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r}: objective={self.objective.name!r} learns from small "
                "differences of large numbers and needs mixed_precision=no"
            )
        if self.rounds is not None:
            from genkit.training.rounds import check

            check(self)
        return self


def load_config(path: str | Path, overrides: typing.Sequence[str] = (), *, data: str | None = None) -> TrainConfig:
    """Settings from a YAML file, changed by dotted ``key=value`` overrides.

    ``data="synthetic"`` replaces the data section by made-up data of the shapes that the model needs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: text that is no YAML mapping, an unknown key (with the nearest known one), a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} is not a file")
    malformed = [o for o in overrides if "=" not in o]
    if malformed:
        raise ValueError(f"override {malformed[0]!r} is not of the form key=value")
    try:
        merged = OmegaConf.load(path)
        if not OmegaConf.is_dict(merged):
            raise ValueError(f"config={str(path)!r} is not a mapping of settings")
        if data is not None:
            merged.data = {"name": data}
        for override in overrides:
            _override(merged, override)
        values = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"config={str(path)!r} cannot be read: {str(error).splitlines()[0]}") from None
    return validate(TrainConfig, values, "").check()  # type: ignore[arg-type]


# What says of which kind a section is; its other settings belong to that kind.
_KINDS = ("kind", "law", "name")


def _override(config: Any, override: str) -> None:
    """``key=value`` put into ``config``.

    A mapping, a section given as a name, and another kind of section replace what is there: the settings of the former
    kind mean nothing to it. Other optimisers keep the settings, most of which they share, and other quantizers those
    that they have as well.

    Raises:
        ValueError: a key that leads through what holds no settings.
    """
    key, _, text = override.partition("=")
    value = OmegaConf.from_dotlist([f"value={text}"])["value"]
    section, _, last = key.rpartition(".")
    if key in ("data", "objective", "optimizer") and isinstance(value, str):
        value = {"name": value}
    elif last in _KINDS and section and section != "optimizer":
        there = OmegaConf.select(config, section)
        if OmegaConf.is_dict(there) and there.get(last) != value:
            key, value = section, {**_common(section, last, value, there), last: value}
    try:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except (TypeError, IndexError, AssertionError) as error:
        reason = str(error).split("\n")[0] or "there is nothing of this name"
        raise ValueError(f"override {override!r}: {reason}") from None


def _common(section: str, setting: str, value: Any, there: typing.Mapping[str, Any]) -> dict[str, Any]:
    """What of ``there`` another quantizer has too, such as ``dim``: it means the same to all of them."""
    cls = members("genkit.quantizers", Quantizer).get(str(value))
    if section.rpartition(".")[2] != "quantizer" or setting != "kind" or cls is None:
        return {}
    return {k: v for k, v in there.items() if k in cls.Config.model_fields}


M = typing.TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: Any, where: str) -> M:
    """``model(**values)`` with readable errors; ``where`` is the section's dotted name."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_line(model, e, where) for e in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _line(model: type[BaseModel], error, where: str) -> str:
    loc, accepted, sections = _settings(model, [str(part) for part in error["loc"]])
    key = ".".join(filter(None, [where, *loc]))
    tag, kinds = _kinds_of(sections)
    if error["type"] == "union_tag_not_found" and kinds:
        return f"{key}={error['input']!r}: {tag} is missing; accepted are {', '.join(kinds)}"
    if error["type"] == "union_tag_invalid" and kinds:
        return unknown(f"{key}.{tag}", error["ctx"]["tag"], kinds)
    if error["type"] in ("model_type", "model_attributes_type") and sections:
        choices, how = (kinds, f"as {key}.{tag}=NAME") if kinds else (sections[0].model_fields, "a mapping")
        return f"{key}={error['input']!r}: expected settings, {how}; accepted are {', '.join(choices)}"
    if error["type"] == "extra_forbidden":
        section = ".".join(filter(None, [where, *loc[:-1]]))
        if section and not accepted:
            return f"unknown key in {section}: {loc[-1]!r}; it takes no settings"
        return unknown(f"unknown key in {section or 'the config'}: key", loc[-1], accepted)
    if error["type"] == "missing":
        return f"{key} is missing and has no default"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if loc else f"{key + ': ' if key else ''}{message}"


def _settings(model: type[BaseModel], loc: list[str]) -> tuple[list[str], list[str], list[type[BaseModel]]]:
    """Where an error is, as a recipe would say it, what the section takes that the last part stands in, and the
    sections that the last part may be.

    Pydantic puts the kind of a section that has several (``Field(discriminator=...)``) into the path.
    """
    path: list[str] = []
    models: list[type[BaseModel]] = [model]
    for i, part in enumerate(loc):
        if len(models) > 1:
            models = [m for m in models if part in _kinds(m)]
            continue
        accepted = list(models[0].model_fields) if models else []
        path.append(part)
        field = models[0].model_fields.get(part) if models else None
        models = [] if field is None else _sections(field.annotation)
        if i == len(loc) - 1:
            return path, accepted, models
    return path, [], []


def _kinds(model: type[BaseModel]) -> set[str]:
    return {str(value) for f in model.model_fields.values() for value in typing.get_args(f.annotation)}


def _kinds_of(sections: list[type[BaseModel]]) -> tuple[str, list[str]]:
    """By which setting sections of several kinds are told apart, and its values; nothing where there is one kind."""
    for name in sections[0].model_fields if len(sections) > 1 else ():
        fields = [section.model_fields.get(name) for section in sections]
        values = [typing.get_args(field.annotation) if field else () for field in fields]
        every = [v for value in values for v in value]
        if all(values) and all(isinstance(v, str) for v in every) and len(set(every)) == len(every):
            return name, every
    return "", []


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting may be."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in _sections(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
