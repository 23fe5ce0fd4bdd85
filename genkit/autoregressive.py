"""What training and pipelines need of an autoregressive network: likelihood, samples, and its tokens as pictures."""

import math

import torch
from torch import Tensor

from genkit.denoisers.base import Condition
from genkit.networks.gpt import GPT, Cache
from genkit.rng import ItemRNG
from genkit.students import Student


class Autoregressive(Student):
    """``log p(x | class) = sum_i log p(token_i | class, token_<i)`` of pictures whose grey levels are the tokens.

    Level ``k`` of ``V`` is the grey ``2 k / (V - 1) - 1``; cells are read row by row.
    """

    network: GPT

    def __init__(self, network: GPT):
        super().__init__(network)
        side = network.config.sample_size
        self.shape, self.num_classes = (1, side, side), network.config.num_classes

    def draw(self, rng: ItemRNG, condition: Condition, num_inference_steps: int | None = None) -> Tensor:
        return self.pictures(self.sample(rng.uniform((math.prod(self.shape),), dtype=torch.float64), condition))

    def tokens(self, x: Tensor) -> Tensor:
        """Levels ``(B, N)`` of pictures ``(B, 1, H, W)`` in [-1, 1]."""
        levels = self.network.config.vocab_size - 1
        return ((x.flatten(1) + 1) / 2 * levels).round().long().clamp(0, levels)

    def pictures(self, tokens: Tensor) -> Tensor:
        """Pictures ``(B, 1, H, W)`` in [-1, 1], float32, of levels ``(B, N)``."""
        return (2 * tokens.float() / (self.network.config.vocab_size - 1) - 1).view(-1, *self.shape)

    def log_probabilities(self, tokens: Tensor, condition: Condition) -> Tensor:
        """``log p(token_i | class, token_<i)`` of each of ``tokens`` ``(B, N)``, in float32 at least."""
        self.calls += 1
        logits = self.network(tokens[:, :-1], condition["class_labels"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]

    @torch.no_grad()
    def sample(self, uniform: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """Tokens ``(B, N)``: each the quantile of its uniform draw, given those before it.

        Guidance is ``l_n + w (l_c - l_n)`` of the logits, which samples ``p_c^w p_n^(1-w)``, normalised at every token.

        Args:
            uniform: ``(B, N)`` in (0, 1); a row is all the randomness of its picture.
            guidance_scale: ``w``; 1 is none and costs no second branch.
        """
        network, b = self.network, len(uniform)
        labels = condition["class_labels"]
        if guidance_scale != 1:
            labels = torch.cat((labels, condition.null()["class_labels"]))
        training = network.training
        network.eval()
        cache: Cache = []
        draws = uniform.double().unsqueeze(-1).unbind(1)
        tokens = torch.empty(b, 0, dtype=torch.int64, device=uniform.device)
        last = tokens
        try:
            for i, draw in enumerate(draws):
                last = torch.cat((last, last)) if guidance_scale != 1 else last
                logits = network(last, None if i else labels, cache)[:, -1].double()
                self.calls += 1 + (guidance_scale != 1)
                if guidance_scale != 1:
                    logits = logits[b:] + guidance_scale * (logits[:b] - logits[b:])
                levels = logits.softmax(-1).cumsum(-1)
                # The last level's sum may round to less than a draw.
                last = torch.searchsorted(levels, draw.contiguous()).clamp(max=logits.shape[1] - 1)
                tokens = torch.cat((tokens, last), dim=1)
        finally:
            network.train(training)
        return tokens
