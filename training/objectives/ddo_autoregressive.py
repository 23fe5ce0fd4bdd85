"""Direct discriminative optimisation of autoregressive models."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.autoregressive import Autoregressive
from genkit.denoisers.base import Condition
from genkit.rng import ItemRNG
from genkit.training.objectives.base import Batch
from genkit.training.objectives.ddo import DDO, ReferenceConfig


class AutoregressiveDDOConfig(ReferenceConfig):
    """Settings of :class:`AutoregressiveDDO`, beside those of every form.

    ``fakes``: ``online``, drawn from the reference at every step, or ``stored``, those of the data (``rounds``).
    """

    alpha: float = Field(10.0, gt=0)
    beta: float = Field(0.02, gt=0)
    condition_dropout: float = Field(0.1, ge=0, le=1)
    fakes: Literal["online", "stored"] = "online"


class AutoregressiveDDO(DDO):
    """``E_data softplus(-beta D) + alpha E_ref softplus(beta D)``, ``D = sum_i log p(token_i) - log p_ref(token_i)``.

    The exact log-ratio of whole sequences, data and samples of the reference alike under teacher forcing. Everything
    else is as in :class:`genkit.training.objectives.ddo.DDO`.

    Source: Zheng et al., arXiv 2503.01103, section 4.
    """

    Config = AutoregressiveDDOConfig
    full_precision = False  # log-probabilities are sums of few terms, in float32 in any case
    student_type = Autoregressive

    student: Autoregressive  # type: ignore[assignment]

    def fakes(self, batch: Batch, condition: Condition, rng: ItemRNG) -> Tensor:
        if self.config.fakes == "stored":
            return super().fakes(batch, condition, rng)
        n = batch.x0[0].numel()
        with self.as_reference() as reference:
            return reference.pictures(reference.sample(rng.uniform((n,), dtype=torch.float64), condition))

    def log_ratio(self, x0: Tensor, condition: Condition, rng: ItemRNG) -> Tensor:
        tokens = self.student.tokens(x0)
        with self.as_reference() as reference:
            before = reference.log_probabilities(tokens, condition).sum(1)
        return self.student.log_probabilities(tokens, condition).sum(1) - before
