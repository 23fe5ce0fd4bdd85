"""What training and pipelines need of an autoregressive network: likelihood, samples, and its tokens as pictures."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit.denoisers.base import Condition
from genkit.networks.gpt import GPT, Cache
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer
from genkit.students import Student
from genkit.token_sampling import TokenSampling

if TYPE_CHECKING:
    from genkit.networks.tokenizer import ImageTokenizer


class Autoregressive(Student):
    """``log p(x | class) = sum_i log p(token_i | class, token_<i)`` of the tokens of a picture, row by row.

    Without a tokenizer tokens are grey levels: level ``k`` of ``V`` is the grey ``2 k / (V - 1) - 1``.

    Args:
        network: the transformer.
        tokenizer: makes tokens of pictures and back; its codes are as many as the network's tokens.

    Raises:
        ValueError: a tokenizer of another number of codes, or of several indices a cell.
    """

    network: GPT

    def __init__(self, network: GPT, tokenizer: "ImageTokenizer | None" = None):
        super().__init__(network)
        side, self.tokenizer = network.config.sample_size, tokenizer
        self.shape, self.num_classes = (1, side, side), network.config.num_classes
        if tokenizer is not None:
            quantizer = tokenizer.quantizer
            if quantizer.indices_shape or quantizer.codebook_size != network.config.vocab_size:
                several = f", {quantizer.indices_shape} a cell" if quantizer.indices_shape else ""
                raise ValueError(
                    f"the tokenizer has {quantizer.codebook_size} codes{several}; the network takes one of vocab_size="
                    f"{network.config.vocab_size} a cell"
                )
            self.shape = (tokenizer.config.in_channels, side * tokenizer.stride, side * tokenizer.stride)

    @classmethod
    def of_pipeline(cls, pipe: Any) -> "Autoregressive":
        return cls(pipe.transformer, pipe.components.get("vqvae"))

    def with_network(self, network: GPT) -> "Autoregressive":
        return Autoregressive(network, self.tokenizer)

    def draw(self, rng: ItemRNG, condition: Condition, num_inference_steps: int | StepAnnealer | None = None) -> Tensor:
        return self.pictures(self.sample(rng.uniform((self.num_tokens,), dtype=torch.float64), condition))

    @property
    def num_tokens(self) -> int:
        """Of a picture."""
        return self.network.config.sample_size**2

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N)`` of pictures ``(B, *shape)`` in [-1, 1]."""
        if self.tokenizer is not None:
            return self.tokenizer.eval().encode(x.to(self.tokenizer.dtype)).indices.flatten(1)
        levels = self.network.config.vocab_size - 1
        return ((x.flatten(1) + 1) / 2 * levels).round().long().clamp(0, levels)

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> Tensor:
        """Pictures ``(B, *shape)`` in [-1, 1], float32, of tokens ``(B, N)``."""
        if self.tokenizer is not None:
            side = self.network.config.sample_size
            return self.tokenizer.eval().decode_tokens(tokens.view(-1, side, side)).float().clamp(-1, 1)
        return (2 * tokens.float() / (self.network.config.vocab_size - 1) - 1).view(-1, *self.shape)

    def log_probabilities(self, tokens: Tensor, condition: Condition) -> Tensor:
        """``log p(token_i | class, token_<i)`` of each of ``tokens`` ``(B, N)``, in float32 at least."""
        self.calls += 1
        logits = self.network(tokens[:, :-1], condition["class_labels"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]

    @torch.no_grad()
    def sample(self, uniform: Tensor, condition: Condition, sampling: TokenSampling | None = None) -> Tensor:
        """Tokens ``(B, N)``: each the quantile of its uniform draw, given those before it.

        Guidance samples ``p_c^w p_n^(1-w)``, normalised at every token. A token that is not guided costs one branch.

        Args:
            uniform: ``(B, N)`` in (0, 1); a row is all the randomness of its picture.
        """
        network, b = self.network, len(uniform)
        sampling = sampling or TokenSampling()
        both = sampling.guided(0)
        labels = condition["class_labels"]
        if both:
            labels = torch.cat((labels, condition.null()["class_labels"]))
        training = network.training
        network.eval()
        cache: Cache = []
        tokens = torch.empty(b, 0, dtype=torch.int64, device=uniform.device)
        last = tokens
        try:
            for i, draw in enumerate(uniform.double().unsqueeze(-1).unbind(1)):
                if both and not sampling.guided(i):
                    both, cache = False, [(k[:b], v[:b]) for k, v in cache]
                logits = network(torch.cat((last, last)) if both else last, None if i else labels, cache)[:, -1]
                self.calls += 1 + both
                logits = logits.double()
                if both:
                    logits = logits[b:] + sampling.guidance_scale * (logits[:b] - logits[b:])
                last = sampling.draw(logits, draw.contiguous())
                tokens = torch.cat((tokens, last), dim=1)
        finally:
            network.train(training)
        return tokens
