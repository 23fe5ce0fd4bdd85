"""From settings to the parts of a run: pipeline, student, teacher, objective, data."""

import hashlib
import inspect
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from genkit._files import first_line
from genkit.data.base import Source
from genkit.denoisers import TwoTime, from_pipeline
from genkit.denoisers.base import Denoiser, FlowMap
from genkit.registry import lookup, members, unknown
from genkit.rng import hash_seed
from genkit.schedulers.base import PathScheduler
from genkit.training.adapters import add_lora, add_selected, base_network
from genkit.training.config import TrainConfig
from genkit.training.inputs import Inputs, synthetic_settings
from genkit.training.objectives.base import Objective
from genkit.training.sections import Model, Named, Sara


@dataclass
class Run:
    """The parts of a run. ``pipe`` holds the network that ``student`` trains; ``inputs`` batches ``source`` for it;
    ``components`` has what stands for the weights of each of ``model.components``."""

    config: TrainConfig
    pipe: DiffusionPipeline
    student: Denoiser
    objective: Objective
    source: Source
    inputs: Inputs
    components: dict[str, str] = field(default_factory=dict)


def build(config: TrainConfig) -> Run:
    """Make everything that ``config`` names, on the CPU; weights depend on ``config.seed`` alone.

    In float32, but for what ``config.frozen_dtype`` says.

    Raises:
        ValueError: parts that do not fit: data of another shape, labels out of range, a teacher on another path, an
            adapter for a network that the method does not train.
    """
    with torch.random.fork_rng():
        torch.manual_seed(hash_seed(config.seed, 0x6E6574))
        pipe = load_pipeline(config.model.pretrained, "model.pretrained") if config.model.pretrained else _new(config)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        components = {name: _fingerprint(pipe.components[name]) for name in config.model.components}
        cls = config.objective_class()
        student = _student(pipe, cls, config)
        if cls.needs_flow_map and not isinstance(student, FlowMap):
            student = TwoTime(student)  # type: ignore[arg-type]
        student.module.requires_grad_(config.adapter.kind == "full")
        if config.adapter.kind != "full":
            embedders = student.embedders() if cls.needs_flow_map else []  # type: ignore[attr-defined]
            if isinstance(config.adapter, Sara):
                add_selected(student, config.adapter, embedders)
            else:
                add_lora(student, config.adapter)
            for embedder in embedders:
                embedder.requires_grad_(True)
        if config.gradient_checkpointing:
            _checkpoint_gradients(student)
        teacher = None
        if config.teacher is not None:
            teacher = _student(load_pipeline(config.teacher, "teacher"), cls, config)
            if isinstance(teacher, Denoiser) and type(teacher.interpolant) is not type(student.interpolant):
                raise ValueError(
                    f"teacher={config.teacher!r} is on the path {type(teacher.interpolant).__name__}, the student on "
                    f"{type(student.interpolant).__name__}"
                )
        settings = config.source_config().model_dump(exclude_unset=True)
        if config.data.name == "synthetic" and "shape" not in settings:
            settings = synthetic_settings(pipe, student) | settings
        source = config.source_class()(**settings)
        source.check_network(base_network(student))  # by its weights, so before these are rounded
        if config.frozen_dtype != "float32":
            taught = [] if teacher is None else [teacher.module.requires_grad_(False)]
            _round_frozen([pipe, *taught], getattr(torch, config.frozen_dtype))
        trainable = [p for p in student.module.parameters() if p.requires_grad]
        objective = cls.make(config.objective_config(), student, teacher, pipe)
        _check_trained(config, objective, trainable)
        if config.frozen_dtype != "float32":
            for role in objective.roles.values():
                _widen_trained(role.module)
    if source.shape is None and objective.needs_samples:
        raise ValueError(
            f"data={config.data.name!r} gives no samples, which objective={config.objective.name!r} needs; methods "
            "that make do with prompts or labels say needs_samples=False"
        )
    inputs = Inputs(pipe, student, source, config.seed, conditioned=objective.needs_condition)
    if inputs.sample_shape is not None:
        objective.check_shape(inputs.sample_shape)
    return Run(config, pipe, student, objective, source, inputs, components)


def _student(pipe: DiffusionPipeline, cls: type[Objective], config: TrainConfig) -> Any:
    """What the objective trains, or is taught by, of ``pipe``."""
    own = getattr(type(pipe), "student_class", None)
    student = own.of_pipeline(pipe) if own is not None else from_pipeline(pipe)
    if not isinstance(student, cls.student_type):
        raise ValueError(
            f"objective={config.objective.name!r} is for networks of the kind {cls.student_type.__name__}, "
            f"{type(student.module).__name__} is of the kind {type(student).__name__}"
        )
    return student


def _check_trained(config: TrainConfig, objective: Objective, trainable: list[nn.Parameter]) -> None:
    """Refuse settings of how the student trains, ``trainable`` in it, where no role trains that."""
    trained = {id(p) for role in objective.roles.values() if role.trains for p in role.module.parameters()}
    if any(id(p) in trained for p in trainable):
        return
    kind = config.adapter.kind
    for name, value, given in (
        ("adapter.kind", kind, kind != "full"),
        ("gradient_checkpointing", config.gradient_checkpointing, config.gradient_checkpointing),
    ):
        if given:
            raise ValueError(
                f"{name}={value}: objective={config.objective.name!r} does not train the network; leave it out"
            )


def _round_frozen(parts: list[Any], dtype: torch.dtype) -> None:
    """Keep what does not train in ``dtype``: whole modules, and all but the adapter of those that have one."""
    # Not the autoencoder: half precision has too few digits for pictures, and float16 overflows in some.
    modules = [
        m
        for p in parts
        for m in ([p] if isinstance(p, nn.Module) else [v for k, v in p.components.items() if k != "vae"])
    ]
    for module in modules:
        if not isinstance(module, nn.Module) or all(p.requires_grad for p in module.parameters()):
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.data = tensor.data.to(dtype)


def _widen_trained(module: nn.Module) -> None:
    """What trains in float32 again: methods make networks of their own of rounded ones, such as a fake of a teacher."""
    whole = all(p.requires_grad for p in module.parameters())
    for tensor in (*module.parameters(), *(module.buffers() if whole else ())):
        if tensor.is_floating_point() and (whole or tensor.requires_grad):
            tensor.data = tensor.data.float()


def check_model(model: Model) -> None:
    """Refuse an unknown network or scheduler, and unknown arguments of either."""
    if model.pretrained is not None:
        return
    network = lookup("genkit.networks", ModelMixin, model.network, setting="model.network")  # type: ignore[arg-type]
    _check_arguments(network, model.settings, "model")
    if _own_pipeline(network) is not None:
        if "scheduler" in model.model_fields_set:
            raise ValueError(f"model.scheduler: network={model.network!r} is no denoiser and takes none")
        return
    _check_arguments(_scheduler_class(model.scheduler), model.scheduler.settings, "model.scheduler")


def load_pipeline(name: str, setting: str) -> DiffusionPipeline:
    """A pipeline of Diffusers or genkit from its folder, or from the Hub by ``owner/name``.

    Raises:
        ValueError: neither a folder with a ``model_index.json`` nor such a name, or a part is missing there.
    """
    folder = _folder(name, setting)
    try:
        return _loaded(name, folder)
    except OSError as error:
        what = "there is no such folder, and the Hub gave none" if folder is None else "it could not be read"
        raise ValueError(
            f"{setting}={name!r}: {what}: {first_line(error)}; accepted are a pipeline folder, with a "
            "model_index.json, and a name (owner/name) on the Hub"
        ) from error


def _loaded(name: str, folder: Path | None) -> DiffusionPipeline:
    if folder is None:
        return DiffusionPipeline.from_pretrained(name, dtype=torch.float32)
    index = json.loads((folder / "model_index.json").read_text())
    ours = {cls.__name__: cls for cls in members("genkit.pipelines", DiffusionPipeline).values()}
    cls = ours.get(str(index.get("_class_name")), DiffusionPipeline)
    return cls.from_pretrained(folder, dtype=torch.float32)


def _folder(name: str, setting: str) -> Path | None:
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.is_dir():
        there = sorted(p.name for p in folder.iterdir())[:8]
        raise ValueError(f"{setting}={name!r} holds {there}, wanted a pipeline folder with a model_index.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return None
    raise ValueError(f"{setting}={name!r} is neither a pipeline folder nor a name (owner/name) on the Hub")


def _new(config: TrainConfig) -> DiffusionPipeline:
    from genkit.pipelines.class_conditional import ClassConditionalPipeline

    model = config.model
    cls = lookup("genkit.networks", ModelMixin, model.network, setting="model.network")  # type: ignore[arg-type]
    network = _call(cls, model.settings, "model")
    own = _own_pipeline(cls)
    pipeline = ClassConditionalPipeline if own is None else own
    parts = {pipeline_component(own): network}
    accepted = inspect.signature(pipeline.__init__).parameters.keys() - {"self", *parts}
    for name, folder in model.components.items():
        if name not in accepted:
            raise ValueError(unknown("model.components: component", name, accepted))
        parts[name] = _component(name, folder)
    if own is None:
        parts["scheduler"] = _call(_scheduler_class(model.scheduler), model.scheduler.settings, "model.scheduler")
    return _call(pipeline, parts, "model.components")


def pipeline_component(own: Any | None) -> str:
    """What the trained network is called in its pipeline."""
    return "transformer" if own is None else own.student_class.component


def _component(name: str, folder: str) -> nn.Module:
    """The model of a folder, or what stands under ``name``, or is the network, in the pipeline of one.

    Raises:
        ValueError: neither; a model of an unknown class.
    """
    setting, path = f"model.components.{name}", Path(folder)
    if (path / "model_index.json").is_file():
        pipe = load_pipeline(folder, setting)
        own = type(pipe) if hasattr(type(pipe), "student_class") else None
        part = pipe.components.get(name) or pipe.components.get(pipeline_component(own))
        if isinstance(part, nn.Module):
            return part
        raise ValueError(f"{setting}={folder!r} is a pipeline of {sorted(pipe.components)}, with no {name}")
    if not (path / "config.json").is_file():
        hint = "" if path.is_dir() else "; there is no such folder: what a run has trained is in OUTPUT_DIR/pipeline"
        raise ValueError(f"{setting}={folder!r} is neither the folder of a model nor that of a pipeline{hint}")
    kind = json.loads((path / "config.json").read_text()).get("_class_name")
    ours = {cls.__name__: cls for cls in members("genkit.networks", ModelMixin).values()}
    cls = ours.get(str(kind), getattr(diffusers, str(kind), None))
    if cls is None:
        raise ValueError(f"{setting}={folder!r} is of the class {kind}, which neither genkit nor Diffusers has")
    return cls.from_pretrained(folder, dtype=torch.float32)


def _fingerprint(module: nn.Module) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _own_pipeline(network: type) -> Any | None:
    """The pipeline of a network that is no denoiser."""
    pipelines = members("genkit.pipelines", DiffusionPipeline).values()
    return next((cls for cls in pipelines if getattr(cls, "network_class", None) is network), None)


def _call(cls, settings: dict, setting: str):
    try:
        return cls(**settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        told = {k: type(v).__name__ if isinstance(v, nn.Module) else v for k, v in settings.items()}
        raise ValueError(f"{setting}: {error} ({cls.__name__} of {told})") from None


def _scheduler_class(scheduler: Named) -> type:
    ours = {cls.__name__: cls for cls in members("genkit.schedulers", PathScheduler).values()}
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    if scheduler.name in ours:
        return ours[scheduler.name]
    if scheduler.name not in known:
        raise ValueError(unknown("model.scheduler.name", scheduler.name, [*known, *ours]))
    return getattr(diffusers, scheduler.name)


def _check_arguments(cls: type, settings: dict, section: str) -> None:
    accepted = [n for n in inspect.signature(cls).parameters if n != "kwargs"]
    for key in settings:
        if key not in accepted:
            raise ValueError(unknown(f"unknown key in {section}: key", key, accepted))
    for key, parameter in inspect.signature(cls).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if key not in settings:
            if named and parameter.default is parameter.empty:
                raise ValueError(f"{section}.{key} is missing and has no default")
        elif typing.get_origin(parameter.annotation) is dict and not isinstance(settings[key], dict):
            raise ValueError(f"{section}.{key}={settings[key]!r}: expected settings, as {section}.{key}.kind=NAME")


def _checkpoint_gradients(student: Denoiser) -> None:
    network: Any = student.module
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise ValueError(f"gradient_checkpointing=True, but {type(network).__name__} does not support it")
    network.enable_gradient_checkpointing()
