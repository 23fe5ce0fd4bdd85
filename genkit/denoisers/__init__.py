"""Denoisers: one call for every network, with its output in every parametrisation."""

from genkit.denoisers.base import Condition, Denoiser, FlowMap, Prediction
from genkit.denoisers.function import FunctionDenoiser, FunctionFlowMap
from genkit.denoisers.network import NetworkDenoiser, from_pipeline, wrap
from genkit.denoisers.two_time import TwoTime

__all__ = [
    "Condition",
    "Denoiser",
    "FlowMap",
    "FunctionDenoiser",
    "FunctionFlowMap",
    "NetworkDenoiser",
    "Prediction",
    "TwoTime",
    "from_pipeline",
    "wrap",
]
