"""Diffusers pipelines: what a user calls."""

from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.coarse_guided import CoarseGuidedPipeline
from genkit.pipelines.few_step import FewStepPipeline
from genkit.pipelines.feynman_kac import FeynmanKacPipeline
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.pipelines.product import ProductPipeline
from genkit.pipelines.text_to_image import TextToImagePipeline
from genkit.pipelines.tokenizer import TokenizerPipeline

__all__ = [
    "AutoregressivePipeline",
    "ClassConditionalPipeline",
    "CoarseGuidedPipeline",
    "FewStepPipeline",
    "FeynmanKacPipeline",
    "MaskedAutoregressivePipeline",
    "ProductPipeline",
    "TextToImagePipeline",
    "TokenizerPipeline",
]
