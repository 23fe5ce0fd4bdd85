"""Diffusers pipelines: what a user calls."""

from genkit.pipelines.class_conditional import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
