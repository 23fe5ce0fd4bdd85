"""The combination rule inside a guider that does something before or after it; see ``Guider.hold``."""

from collections.abc import Mapping
from typing import Any

from genkit.guidance.base import Guider
from genkit.registry import lookup


def inner_rule(rule: Mapping[str, Any] | None, guidance_scale: float) -> Guider:
    """The guider that ``rule`` describes, as ``{"name": "apg", "guidance_scale": 8}``; by default CFG at a scale.

    Args:
        rule: the name of a guider's file and its settings, which are JSON, so that the outer guider can be saved.
        guidance_scale: of the default.

    Raises:
        ValueError: no ``name``, an unknown one, or settings that the rule refuses.
    """
    if rule is None:
        rule = {"name": "cfg", "guidance_scale": guidance_scale}
    settings = dict(rule)
    cls = lookup("genkit.guidance", Guider, settings.pop("name", None), setting="rule['name']")
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"rule={dict(rule)}: {cls.__name__} does not take these settings: {error}") from None
