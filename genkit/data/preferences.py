"""Pairs of samples of one prompt, of which one is preferred."""

import logging
from collections.abc import Hashable

import torch
from pydantic import Field

from genkit.data.base import Source, SourceConfig
from genkit.data.feedback import known_scores
from genkit.data.transfer import Named

logger = logging.getLogger("genkit.data")


class PreferencesConfig(SourceConfig):
    """Whose samples, and which of them are paired."""

    samples: Named = Field(description="source of samples with scores: pairs or image_folder, its settings beside it")
    threshold: float | None = Field(
        default=None, description="preferred samples score at least this, and rejected ones less"
    )
    pairs_per_group: int = Field(default=1, ge=1, description="of a prompt or label, at most")


class Preferences(Source):
    """``x0``, a preferred sample, and ``lose`` ``(B, *shape)``, a rejected one of the same prompt or label.

    Of each group (a prompt, a label, or a ``group`` of ``metadata.jsonl``) the best sample is paired with the worst,
    the second best with the second worst, and so on. A group whose best is no better than its worst, or that is all on
    one side of ``threshold``, gives no pair; ``skipped`` counts these. Of equal scores the earlier is the better.

    Raises:
        ValueError: samples without scores; no pair at all; a group of several prompts.
    """

    Config = PreferencesConfig
    sample_fields = ("x0", "lose")

    def __init__(self, **settings):
        super().__init__(**settings)
        self.inner: Source = self.config.samples.make("data.samples.name")
        self.shape, self.num_classes = self.inner.shape, self.inner.num_classes
        scores = known_scores(self.inner, self.config.samples.name).tolist()
        groups: dict[Hashable, list[int]] = {}
        for record, key in enumerate(self.inner.groups() or [None] * len(scores)):
            groups.setdefault(key, []).append(record)
        found = [self._pairs(members, scores) for members in groups.values()]
        self.skipped = sum(not pairs for pairs in found)
        pairs = [pair for of_group in found for pair in of_group]
        if not pairs:
            raise ValueError(
                f"data={self.config.samples.name}: none of {len(groups)} prompts has both a preferred and a rejected "
                f"sample; {len(scores)} scores go from {min(scores):.4g} to {max(scores):.4g}, "
                f"threshold={self.config.threshold}"
            )
        if self.skipped:
            logger.warning("%d of %d prompts have no pair of samples and are left out", self.skipped, len(groups))
        self.win, self.lose = map(torch.tensor, zip(*pairs, strict=True))
        self.length = len(pairs)

    def _pairs(self, members: list[int], scores: list[float]) -> list[tuple[int, int]]:
        """Records of preferred and rejected samples of a group."""
        order = sorted(members, key=lambda record: -scores[record])
        pairs: list[tuple[int, int]] = []
        for win, lose in zip(order[: len(order) // 2], reversed(order), strict=False):
            apart = scores[win] > scores[lose]
            if self.config.threshold is not None:
                apart = scores[win] >= self.config.threshold > scores[lose]
            if not apart or len(pairs) == self.config.pairs_per_group:
                break
            pairs.append((win, lose))
        return pairs

    def check_network(self, network):
        self.inner.check_network(network)

    def read(self, records, items):
        win, lose = (self.inner.read(chosen[records], items) for chosen in (self.win, self.lose))
        if win.get("prompts") != lose.get("prompts"):
            differ = next(p for p in zip(win["prompts"], lose["prompts"], strict=True) if p[0] != p[1])
            raise ValueError(f"a group holds samples of several prompts: {differ[0]!r} and {differ[1]!r}")
        kept = {key: value for key, value in win.items() if key in ("x0", "class_labels", "prompts")}
        return {**kept, "lose": lose["x0"]}
