"""Particle methods that are ready to run on vectors, found by walking their folder."""

import inspect
from collections.abc import Callable
from functools import partial

from genkit.feynman_kac import EntropicAnnealing, FeynmanKac
from genkit.registry import members

# By the argument's name: what a constructor without default for it is given; one with a default is also tried with it.
GIVEN = {"reward": lambda x: x[:, 0]}


def _accepted(cls: type[FeynmanKac]) -> dict[str, inspect.Parameter]:
    """Arguments of the constructor, and those that it passes on."""
    own = dict(inspect.signature(cls.__init__).parameters)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in own.values())
    return {**inspect.signature(FeynmanKac.__init__).parameters, **own} if passes_on else own


def ready(cls: type[FeynmanKac], num_particles: int, *, optional: bool = False, **settings) -> FeynmanKac:
    """``cls(num_particles, **settings)`` with what it needs; settings that it does not take are left out."""
    accepted = _accepted(cls)
    given = {
        name: value
        for name, value in GIVEN.items()
        if name in accepted and (optional or accepted[name].default is inspect.Parameter.empty)
    }
    return cls(num_particles, **given, **{k: v for k, v in settings.items() if k in accepted})


FOUND = members("genkit.feynman_kac", FeynmanKac)
METHODS: dict[str, Callable[..., FeynmanKac]] = {}
for _name, _cls in FOUND.items():
    METHODS[_name] = partial(ready, _cls)
    if any(p.default is not p.empty for name, p in _accepted(_cls).items() if name in GIVEN):
        METHODS[f"{_name}, all given"] = partial(ready, _cls, optional=True)
METHODS["look-ahead"] = partial(METHODS["fk_steering"], lookahead_steps=2)
METHODS["annealed"] = lambda k, **settings: METHODS["fk_steering"](k, **{"annealing": EntropicAnnealing(), **settings})
