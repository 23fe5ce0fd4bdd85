"""What training and pipelines need of an image tokenizer."""

from typing import NoReturn

import torch
from torch import Tensor

from genkit.denoisers.base import Condition
from genkit.networks.tokenizer import ImageTokenizer, Reconstruction
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer
from genkit.students import Student


class Tokenizer(Student):
    """Makes pictures of pictures, by way of tokens, and none from noise; without classes."""

    component = "vqvae"
    network: ImageTokenizer

    def __init__(self, network: ImageTokenizer):
        super().__init__(network)
        side = network.config["sample_size"]
        self.shape = (network.config["in_channels"], side, side)

    def __call__(self, x: Tensor) -> Reconstruction:
        """What is left of pictures ``(B, C, H, W)`` in [-1, 1], in float32 at least."""
        self.calls += 1
        made = self.network(x)
        sample = made.sample
        return Reconstruction(sample.to(torch.promote_types(sample.dtype, torch.float32)), made.quantized)

    def draw(
        self, rng: ItemRNG, condition: Condition, num_inference_steps: int | StepAnnealer | None = None
    ) -> NoReturn:
        """Nothing can be drawn from a tokenizer.

        Raises:
            ValueError: always.
        """
        raise ValueError("a tokenizer draws no samples; train a model of its tokens, with the tokenizer beside it")
