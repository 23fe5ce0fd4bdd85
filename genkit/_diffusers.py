"""Every use that the toolkit makes of names which Diffusers does not promise to keep. Tried on 0.42.0 and 0.42.1."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput

__all__ = ["GuiderOutput", "default_component", "identifier", "mark_loadable", "prepare_batch", "quiet_construction"]


def prepare_batch(data: dict, slot: int, name: str, block_state=None):
    """One branch's inputs of a modular pipeline: ``slot`` 0 is conditional, 1 unconditional; ``name`` labels it."""
    if block_state is None:
        return BaseGuidance._prepare_batch(data, slot, name)
    return BaseGuidance._prepare_batch_from_block_state(data, block_state, slot, name)


def identifier(batch) -> str:
    """The label that :func:`prepare_batch` gave."""
    return getattr(batch, BaseGuidance._identifier_key)


def mark_loadable(component) -> None:
    """Make a modular pipeline save ``component``: without a load id it is rebuilt from the block's default instead."""
    component._diffusers_load_id = "inline|" + type(component).__name__ + "|null|null"


def default_component(pipe, name: str):
    """A new ``name`` as the blocks of the modular pipeline ``pipe`` declare it."""
    specs = {spec.name: spec for spec in pipe._blocks.expected_components}
    return specs[name].create()


def component_names(pipe) -> list[str]:
    """Names of the components that a modular pipeline has, loaded or not."""
    return list(pipe._component_specs)


@contextmanager
def quiet_construction() -> Iterator[None]:
    """Without the warning that Diffusers logs whenever any guider is constructed (its API is experimental)."""
    logger = logging.getLogger("diffusers.guiders.guider_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
