"""What a SaRA has done to it beside the optimiser's updates: its ranks are lowered, its places become fewer."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from genkit.rng import hash_seed
from genkit.sara import add_rank_gradient, fingerprint, lowerable, sara_layers, shrink
from genkit.training.checkpoint import CheckpointError
from genkit.training.config import TrainConfig
from genkit.training.sections import Sara

logger = logging.getLogger("genkit.training")

Known = Mapping[str, Mapping[str, str]]  # hashes of the places and of the base of each weight, by its name


def known(module: nn.Module) -> dict[str, dict[str, str]]:
    """What the SaRA of ``module`` is a change of: a checkpoint has neither the places nor the base weights."""
    return {
        name: {"base": sara.hashes["float32"], "places": fingerprint(sara.index)}
        for name, sara in sara_layers(module).items()
    }


def check_known(path: Path, had: Known, has: Known) -> None:
    """Refuse the checkpoint at ``path``, of what ``had`` says, for a SaRA of what ``has`` says.

    Raises:
        CheckpointError: it is of other base weights, or of other places in them.
    """
    for name in sorted({*had, *has}):
        if name not in had or name not in has:
            raise CheckpointError(
                f"{path} is of {len(had)} weights under SaRA and here are {len(has)}: {name} is only "
                f"{'in the checkpoint' if name in had else 'here'}"
            )
        for part, what in (("base", "another base model"), ("places", "other places")):
            if had[name][part] != has[name][part]:
                raise CheckpointError(
                    f"{path} has the changes of {what}: {name} has the hash {has[name][part]} here, wanted "
                    f"{had[name][part]}; a SaRA goes on from the base weights and the selection that it began with"
                )


class SparseTraining:
    """The low-rank term and the progressive adjustment of the SaRA in ``module``.

    Raises:
        ValueError: weight decay, which would move what the adjustment freezes.
    """

    def __init__(self, module: nn.Module, settings: Sara, config: TrainConfig, optimizer: Optimizer):
        self.module, self.settings, self.seed, self.optimizer = module, settings, config.seed, optimizer
        ratio = settings.progressive_ratio
        self.adjusted_at = None if ratio is None else round(ratio * config.max_train_steps)
        decays = [group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")]
        if decays and ratio is not None:
            raise ValueError(
                f"optimizer.weight_decay={decays[0]}: it would move the weights that adapter.progressive_ratio={ratio} "
                "freezes; set optimizer.weight_decay=0, or adapter.progressive_ratio=null"
            )
        self.layers = lowerable(module) if settings.lambda_rank else []
        self.known = known(module)
        self.step = 0

    def begin(self, step: int) -> None:
        """Told of every step before it: at its share of them, places above the threshold leave, with all that the
        optimiser remembers."""
        self.step = step
        if step != self.adjusted_at:
            return
        active, before = shrink(self.module)
        self.optimizer.state.clear()
        logger.info("step %d: of %d selected weights %d are still small and train on", step, before, active)

    def add_gradient(self) -> None:
        """Add that of the low-rank term of one layer, the same on every process."""
        if self.layers:
            number = hash_seed(self.seed, self.step, *b"rank") % len(self.layers)
            add_rank_gradient(*self.layers[number], self.settings.lambda_rank, self.settings.rank_target)
