"""Next-token prediction."""

from collections.abc import Iterator

from pydantic import Field

from genkit.autoregressive import Autoregressive
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, drop_condition


class NextTokenConfig(ObjectiveConfig):
    """``condition_dropout``: share of items that are learned without class, so that the model can be guided."""

    condition_dropout: float = Field(0.1, ge=0, le=1)


class NextToken(Objective):
    """``-mean_i log p(token_i | class, token_<i)``, in nats a token.

    Source: Sun et al., "Autoregressive model beats diffusion: Llama for scalable image generation", arXiv 2406.06525.
    """

    Config = NextTokenConfig
    student_type = Autoregressive

    student: Autoregressive  # type: ignore[assignment]

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        condition, _ = drop_condition(batch, rng, self.config.condition_dropout)
        yield Loss(-self.student.log_probabilities(self.student.tokens(batch.x0), condition).mean(), {})
