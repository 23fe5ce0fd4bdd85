"""Every use that the toolkit makes of names which Diffusers does not promise to keep. Tried on 0.42.1.

Beside these, guiders keep the contract that ``BaseGuidance`` has with its subclasses (``_input_predictions``) and with
modular pipelines (``_enabled``, which they read).
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import ComponentSpec
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.utils import logging as logging_of_diffusers
from torch import nn

__all__ = [
    "GuiderOutput",
    "accepts_backend",
    "active_backend",
    "add_backend",
    "attention_processor",
    "backend_function",
    "backend_names",
    "casting_dtype",
    "component_names",
    "execution_device",
    "has_backend",
    "identifier",
    "prepare_batch",
    "put_component",
    "quiet_construction",
    "restore_component",
    "set_backend",
    "set_config",
    "without_loading_bars",
    "without_progress_bars",
]


def execution_device(pipe) -> torch.device:
    """Where a pipeline computes, also while its networks wait elsewhere (offloading)."""
    return pipe._execution_device


def prepare_batch(data: dict, slot: int, name: str, block_state=None):
    """One branch's inputs of a modular pipeline: ``slot`` 0 is conditional, 1 unconditional; ``name`` labels it."""
    if block_state is None:
        return BaseGuidance._prepare_batch(data, slot, name)
    return BaseGuidance._prepare_batch_from_block_state(data, block_state, slot, name)


def identifier(batch) -> str:
    """The label that :func:`prepare_batch` gave."""
    return getattr(batch, BaseGuidance._identifier_key)


def put_component(pipe, name: str, component) -> None:
    """Set a modular pipeline's component such that ``save_pretrained`` keeps it.

    Blocks declare guiders as made from a configuration of their own, and such components are not saved.
    """
    pipe._component_specs[name] = ComponentSpec(name=name, type_hint=type(component))
    pipe.update_components(**{name: component})


def restore_component(pipe, name: str) -> None:
    """Set a modular pipeline's component to what its blocks declare, and forget that another was to be saved."""
    specs = {spec.name: spec for spec in pipe._blocks.expected_components}
    pipe.update_components(**{name: specs[name].create()})
    pipe._internal_dict = FrozenDict({key: value for key, value in pipe.config.items() if key != name})


def component_names(pipe) -> list[str]:
    """Names of the components that a modular pipeline has, loaded or not."""
    return list(pipe._component_specs)


def set_config(model, **values) -> None:
    """Change entries of a model's config such that ``from_config`` keeps them: it skips what was a default."""
    defaults = [name for name in model.config.get("_use_default_values", []) if name not in values]
    model.register_to_config(**values, _use_default_values=defaults)


@contextmanager
def quiet_construction() -> Iterator[None]:
    """Without the warning that Diffusers logs whenever any guider is constructed (its API is experimental)."""
    logger = logging.getLogger("diffusers.guiders.guider_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Pipelines, and the networks of Transformers in them, are loaded without bars; after it all is as before."""
    from transformers.utils import logging as transformers_logging

    libraries = (logging_of_diffusers, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@contextmanager
def without_progress_bars(pipe) -> Iterator[None]:
    """A pipeline's calls show none within; after it all is as before."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe._progress_bar_config = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def backend_names() -> list[str]:
    """Of the attention backends that Diffusers' dispatcher knows, with those that were added."""
    return [member.value for member in _dispatcher().AttentionBackendName]


def add_backend(name: str, function: Callable) -> None:
    """Teach Diffusers' dispatcher an attention backend.

    ``function`` is called as the dispatcher calls its own, with tensors ``(B, N, H, D)``; it is given those arguments
    that its signature names.

    Raises:
        ValueError: the name is that of another backend.
        RuntimeError: this Diffusers keeps its backends in another way.
    """
    dispatcher = _dispatcher()
    enum, registry = dispatcher.AttentionBackendName, dispatcher._AttentionBackendRegistry
    taken = {part: member for member in enum for part in (member.value, member.name)}
    if known := taken.get(name, taken.get(name.upper())):
        if registry._backends.get(known) != function:
            raise ValueError(f"name={name!r} is an attention backend already; choose another name")
        return
    # The enumeration is closed, and its names are looked up in it, so that it has to be given a member.
    member = str.__new__(enum, name)
    member._name_, member._value_ = name.upper(), name
    enum._member_map_[member._name_] = member
    enum._value2member_map_[name] = member
    enum._member_names_.append(member._name_)
    registry.register(member)(function)


def backend_function(name: str) -> tuple[Any, Callable, set[str]]:
    """An attention backend of the dispatcher: its member, its function, and names of the arguments it takes.

    Where a function refuses some of the arguments that its signature names, its attribute ``takes`` has the others.

    Hub kernels are downloaded, as Diffusers does it when they are chosen.

    Raises:
        RuntimeError: a package is missing, with the command that installs it.
    """
    dispatcher = _dispatcher()
    member = dispatcher.AttentionBackendName(name)
    dispatcher._check_attention_backend_requirements(member)
    dispatcher._maybe_download_kernel_for_backend(member)
    function = dispatcher._AttentionBackendRegistry._backends[member]
    return member, function, set(getattr(function, "takes", inspect.signature(function).parameters))


@contextmanager
def active_backend(member: Any) -> Iterator[None]:
    """Attention that has no backend of its own runs on ``member`` within."""
    registry = _dispatcher()._AttentionBackendRegistry
    before = registry._active_backend
    registry._active_backend = member
    try:
        yield
    finally:
        registry._active_backend = before


def casting_dtype(module: nn.Module) -> torch.dtype | None:
    """What a module computes in under Diffusers' layerwise casting, whatever its weights lie in; else ``None``."""
    for part in module.modules():
        hooks = getattr(part, "_diffusers_hook", None)
        if (hook := hooks and hooks.get_hook("layerwise_casting")) is not None:
            return hook.compute_dtype
    return None


def attention_processor(module: nn.Module) -> Any:
    """The processor of one of Diffusers' attention modules; ``None`` for any other module."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    return module.processor if isinstance(module, (Attention, AttentionModuleMixin, MochiAttention)) else None


def has_backend(processor: Any) -> bool:
    """Whether a processor asks the dispatcher for a backend of its own."""
    return hasattr(processor, "_attention_backend")


def accepts_backend(processor: Any, name: str) -> bool:
    """Whether a processor that has a backend may be given this one: some were written for one alone."""
    allowed = getattr(processor, "_SUPPORTED_BACKENDS", None)
    return allowed is None or name in allowed


def set_backend(processor: Any, member: Any) -> Callable[[], None]:
    """Give a processor a backend of its own; return what undoes it.

    Raises:
        ValueError: the processor splits sequences over devices, which the backend cannot.
    """
    parallel = getattr(processor, "_parallel_config", None) is not None
    if parallel and not _dispatcher()._AttentionBackendRegistry._is_context_parallel_available(member):
        raise ValueError(f"backend={member.value!r} has no context parallelism, which is on; choose 'native'")
    name, own = "_attention_backend", vars(processor)  # it may be the class's
    undo = partial(setattr, processor, name, own[name]) if name in own else partial(delattr, processor, name)
    processor._attention_backend = member
    return undo


def _dispatcher() -> Any:
    """Diffusers' module of attention backends, if it is built as expected."""
    import diffusers
    from diffusers.models import attention_dispatch

    enum = getattr(attention_dispatch, "AttentionBackendName", None)
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    needed = {
        "AttentionBackendName": (enum, ("_member_map_", "_value2member_map_", "_member_names_")),
        "_AttentionBackendRegistry": (
            registry,
            ("register", "_backends", "_active_backend", "_is_context_parallel_available"),
        ),
        "attention_dispatch": (
            attention_dispatch,
            ("_check_attention_backend_requirements", "_maybe_download_kernel_for_backend"),
        ),
    }
    lost = [f"{owner}.{name}" for owner, (part, names) in needed.items() for name in names if not hasattr(part, name)]
    if lost:
        raise RuntimeError(
            f"Diffusers {diffusers.__version__} keeps its attention backends in another way than 0.42.1 does "
            f"({', '.join(lost)} is not there); install one of the versions that genkit names"
        )
    return attention_dispatch
