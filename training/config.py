"""The settings of a run: YAML, dotted overrides, and what does not fit is refused before work starts."""

import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, field_validator, model_validator
from yaml import YAMLError

from genkit.data.base import Source
from genkit.quantizers.base import Quantizer
from genkit.registry import lookup, members, unknown
from genkit.training.objectives.base import Objective
from genkit.training.sections import (
    Adapter,
    Distill,
    Ema,
    Evaluation,
    Health,
    Model,
    Named,
    Rounds,
    Sampling,
    Sara,
    Section,
)
from genkit.training.validation import validate


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
