"""Every use that the toolkit makes of names which Diffusers does not promise to keep. Tried on 0.42.1.

Beside these, guiders keep the contract that ``BaseGuidance`` has with its subclasses (``_input_predictions``) and with
modular pipelines (``_enabled``, which they read).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ComponentSpec
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.utils import logging as logging_of_diffusers

__all__ = [
    "GuiderOutput",
    "component_names",
    "execution_device",
    "identifier",
    "prepare_batch",
    "put_component",
    "quiet_construction",
    "restore_component",
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
