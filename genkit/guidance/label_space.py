"""Which condition of a generator belongs to which class of a classifier."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Condition
from genkit.denoisers.network import unwrap

# What a condition says of the call and not of the class or prompt.
_OF_THE_CALL = ("time_ids", "guidance", "timestep_cond")
_NUM_CLASSES = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a classifier as conditions, and the ones that samples are to be.

    Args:
        candidates: a :class:`Condition` with a row for each class; ``None`` where class ``k`` is the label ``k``.
        desired: row of each sample, an int or ``(B,)``; ``None`` where the samples' class labels say it.
    """

    candidates: Any
    desired: Any

    def check(self, k: int, network, batch: int, condition: Condition | None) -> None:
        """Refuse what does not fit a classifier of ``k`` classes and the ``network``.

        Args:
            k: number of classes.
            network: whose configuration may tell how many classes it knows.
            batch: number of samples.
            condition: of the run; ``None`` if it is not known.

        Raises:
            ValueError: another label space, or a class that is not among the ``k``.
        """
        self._check_candidates(k, network, condition)
        if self.desired is not None:
            rows = torch.as_tensor(self.desired)
            if rows.is_floating_point() or rows.ndim > 1 or rows.numel() not in (1, batch):
                raise ValueError(f"desired={self.desired!r}: accepted is an int, or {batch}, one for each sample")
            if not bool(((rows >= 0) & (rows < k)).all()):
                raise ValueError(f"desired={self.desired!r}: accepted are 0 to {k - 1}")
        elif self.candidates is not None and "class_labels" not in self.candidates.values:
            raise ValueError("desired=None: accepted is the row of candidates that each sample is to be")
        elif condition is not None and int(self._rows_of(condition["class_labels"]).max()) >= k:
            raise ValueError(f"class_labels={condition['class_labels'].tolist()}: the classifier knows 0 to {k - 1}")

    def _check_candidates(self, k: int, network, condition: Condition | None) -> None:
        candidates = self.candidates
        if candidates is not None:
            if not isinstance(candidates, Condition) or len(candidates) != k:
                got = f"{len(candidates)} rows" if isinstance(candidates, Condition) else type(candidates).__name__
                raise ValueError(f"candidates={got}: accepted is a Condition of {k} rows, one for each of the classes")
            if condition is not None and not set(candidates.values) <= set(condition.values):
                raise ValueError(
                    f"candidates={sorted(candidates.values)}: accepted are those of {sorted(condition.values)}"
                )
            return
        num_classes, known = _num_classes(network), condition is not None and "class_labels" in condition.values
        if num_classes is None and not known:
            raise ValueError(
                "candidates=None, but the model takes no class labels: give the condition of each of the classifier's "
                f"{k} classes by using(candidates=..., desired=...)"
            )
        if num_classes is None and condition is not None and condition.null_values is not None:
            num_classes = int(condition.null_values["class_labels"].max())
        if num_classes not in (None, k):
            raise ValueError(
                f"classifier with {k} classes for a model of {num_classes}: accepted is the same label space, or "
                'using(candidates=Condition({"class_labels": ids})) with the label of each of its classes'
            )

    def rows(self, condition: Condition, rows: Tensor) -> Tensor:
        """The classes that samples are to be, ``(B,)``; ``rows`` are their places in the batch that was begun with."""
        if self.desired is None:
            return self._rows_of(condition["class_labels"])
        desired = torch.as_tensor(self.desired, device=rows.device).flatten().long()
        return desired[rows] if len(desired) > 1 else desired.expand(len(rows))

    def _rows_of(self, labels: Tensor) -> Tensor:
        if self.candidates is None:
            return labels
        same = labels[:, None] == self.candidates["class_labels"].to(labels.device)
        if not bool(same.any(1).all()):
            missing = labels[~same.any(1)].unique().tolist()
            raise ValueError(f"class_labels={missing}: none of the candidates, so the classifier does not know them")
        return same.int().argmax(1)

    def values(self, chosen: Tensor) -> dict[str, Tensor]:
        """What a condition holds for the ``chosen`` classes ``(B,)``."""
        if self.candidates is None:
            return {"class_labels": chosen}
        named = {k: v for k, v in self.candidates.values.items() if k not in _OF_THE_CALL}
        return {k: v[chosen.to(v.device)].to(chosen.device) for k, v in named.items()}


def _num_classes(network) -> int | None:
    """How many classes a network knows by its configuration."""
    config = getattr(unwrap(network), "config", {}) if isinstance(network, nn.Module) else {}
    return next((config[key] for key in _NUM_CLASSES if isinstance(config, dict) and config.get(key)), None)
