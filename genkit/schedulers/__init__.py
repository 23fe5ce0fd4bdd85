"""Solvers, as Diffusers schedulers."""

from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler
from genkit.schedulers.flow_map import FlowMapScheduler
from genkit.schedulers.interpolant import InterpolantScheduler
from genkit.schedulers.pndm import PseudoNumericalScheduler

__all__ = ["ExactDenoiserScheduler", "FlowMapScheduler", "InterpolantScheduler", "PseudoNumericalScheduler"]
