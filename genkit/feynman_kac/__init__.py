"""Particles: weighted, resampled samples that follow the density which a score sum, a reward or both only aim at."""

from genkit.feynman_kac.entropic import EntropicAnnealing
from genkit.feynman_kac.fk_steering import FKSteering
from genkit.feynman_kac.fkc import FKC
from genkit.feynman_kac.log_weights import LogWeights
from genkit.guidance.experts import Experts

__all__ = ["EntropicAnnealing", "Experts", "FKC", "FKSteering", "LogWeights"]
