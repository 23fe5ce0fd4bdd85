"""Solvers, as Diffusers schedulers.

Every scheduler can be imported from here: ``from genkit.schedulers import FlowMapScheduler``.
"""

from genkit.registry import member_class
from genkit.schedulers.base import PathScheduler

__all__ = ["PathScheduler"]


def __getattr__(name: str):
    return member_class(__name__, PathScheduler, name)
