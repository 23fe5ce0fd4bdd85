"""Diffusers pipelines: what a user calls."""

from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.coarse_guided import CoarseGuidedPipeline
from genkit.pipelines.few_step import FewStepPipeline
from genkit.pipelines.feynman_kac import FeynmanKacPipeline
from genkit.pipelines.product import ProductPipeline
from genkit.pipelines.text_to_image import TextToImagePipeline

__all__ = [
    "ClassConditionalPipeline",
    "CoarseGuidedPipeline",
    "FewStepPipeline",
    "FeynmanKacPipeline",
    "ProductPipeline",
    "TextToImagePipeline",
]
