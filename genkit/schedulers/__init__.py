"""Solvers, as Diffusers schedulers."""

from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler
from genkit.schedulers.flow_map import FlowMapScheduler

__all__ = ["ExactDenoiserScheduler", "FlowMapScheduler"]
