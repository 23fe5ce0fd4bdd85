"""Particles: weighted, resampled samples that follow the density which a score sum, a reward or both only aim at."""

from importlib import import_module

from genkit.feynman_kac.log_weights import LogWeights

# The sampling loop knows log-weights and the methods know the loop, so they are imported when they are asked for.
_METHODS = {
    "EntropicAnnealing": "genkit.feynman_kac.entropic",
    "Experts": "genkit.feynman_kac.experts",
    "FKC": "genkit.feynman_kac.fkc",
    "FKSteering": "genkit.feynman_kac.fk_steering",
}
__all__ = ["EntropicAnnealing", "Experts", "FKC", "FKSteering", "LogWeights"]


def __getattr__(name: str):
    if name in _METHODS:
        return getattr(import_module(_METHODS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
