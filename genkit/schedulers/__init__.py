"""Solvers, as Diffusers schedulers."""

from genkit.schedulers.flow_map import FlowMapScheduler

__all__ = ["FlowMapScheduler"]
