"""Guiders that are ready to run: with what they need and JSON cannot hold (see ``Guider.using``)."""

import inspect
from collections.abc import Callable

from genkit.guidance.base import Guider
from genkit.registry import members

GUIDERS = members("genkit.guidance", Guider)

# By the guider's name: what `using` is given for samples of shape (B, ...), or settings of the constructor.
GIVEN: dict[str, Callable[[tuple[int, ...]], dict]] = {}


def ready(cls: type[Guider], shape: tuple[int, ...], **settings) -> Guider:
    """``cls(**settings)`` that can run on samples of ``shape``; settings that it does not take are left out."""
    name = cls.__module__.rpartition(".")[2]
    given = GIVEN[name](shape) if name in GIVEN else {}
    accepted = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in given.items() if k not in cls.takes} | settings
    guider = cls(**{k: v for k, v in settings.items() if k in accepted})
    attached = {k: v for k, v in given.items() if k in cls.takes}
    return guider.using(**attached) if attached else guider
