"""Particles: weighted, resampled samples that follow the density which a score sum, a reward or both only aim at.

A file a method, which can be imported from here: ``from genkit.feynman_kac import FKC, FKSteering``.
"""

from genkit.feynman_kac.base import FeynmanKac
from genkit.feynman_kac.entropic import EntropicAnnealing
from genkit.feynman_kac.log_weights import LogWeights
from genkit.registry import member_class

__all__ = ["EntropicAnnealing", "FeynmanKac", "LogWeights"]


def __getattr__(name: str):
    return member_class(__name__, FeynmanKac, name)
