"""Numbers that a flow map is told of every sample beside its condition: a guidance scale, the ends of an interval."""

from collections.abc import Mapping

import torch
from torch import Tensor

from genkit.denoisers.base import Condition


def told(condition: Condition, defaults: Mapping[str, float], t: Tensor) -> dict[str, Tensor]:
    """What a network that embeds the scalars ``defaults`` is given, ``(B,)`` each, in the dtype of the times ``t``.

    ``guidance_scale`` ``w`` goes in as ``1 - 1/w``, which is 0 without guidance and below 1 however strong it is; every
    other scalar as it is. One that ``condition`` does not name has its default.

    Source of the first: Geng et al., "Improved mean flows", arXiv 2512.02012.
    """
    given = {}
    for name, default in defaults.items():
        value = condition.values[name].to(t) if name in condition.values else torch.full_like(t, default)
        given[name] = 1 - 1 / value if name == "guidance_scale" else value
    return given


def without(condition: Condition, names: Mapping[str, float]) -> Condition:
    """The condition without the scalars called ``names``: what a network that does not embed them is given."""

    def kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in values.items() if k not in names}

    if not any(name in condition.values for name in names):
        return condition
    return Condition(kept(condition.values), None if condition.null_values is None else kept(condition.null_values))
