"""Any reward of ``genkit.rewards`` as a metric: CLIPScore, PickScore, HPSv2, ImageReward, aesthetics and others."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genkit import rewards
from genkit.eval.metrics._per_image import PerImage, batches
from genkit.eval.metrics.base import FeatureSet
from genkit.pipelines.by_name import parse_settings
from genkit.registry import lookup


class RewardMetric(PerImage):
    """The mean reward of the generated images, under what the reward is called; higher is better.

    A reward that takes prompts needs those that the images were asked for, one that takes labels their labels. Its
    settings, and with them the network that it loads, are part of the protocol: scores of different networks are not
    comparable. Pixels are rounded after resizing, as the libraries round them that published scores were made with
    (``quantise``, off in training), unless the settings say otherwise.

    Args:
        reward: its name, one of ``genkit.rewards.names()``, and after a colon settings: ``clip_score:model=FOLDER``.
        reward_settings: what else it is made with.
        batch_size, device: how it is computed.

    Raises:
        ValueError: an unknown name, settings that the reward refuses, a batch size below 1.
    """

    argument = "reward"

    def __init__(
        self,
        reward: str,
        reward_settings: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        self._reward = _made(reward, reward_settings or {}).to(device)
        self._batch_size, self._device = batch_size, device
        self.reward, self.reward_settings = self._reward.called, self._reward.config.model_dump(mode="json")
        self.reads_generated = ("images", *filter(None, [self._reward.takes]))

    @property
    def name(self) -> str:
        return f"reward:{self.reward}"

    def values(self, reference: FeatureSet | None, generated: FeatureSet) -> dict[str, Tensor]:
        assert generated.images is not None
        takes, parts, start = self._reward.takes, [], 0
        asked = None if takes is None else getattr(generated, takes)
        for batch in batches(generated, self._batch_size):
            part = slice(start, start + len(batch))
            with torch.no_grad():
                score = self._reward(batch.float().to(self._device), None if asked is None else asked[part])
            bad = (~score.isfinite()).nonzero().flatten()
            if len(bad):
                raise ValueError(f"{self.name}: the reward of image {start + int(bad[0])} is not finite")
            parts.append(score.double().cpu())
            start += len(batch)
        return {self.reward: torch.cat(parts)}


def _made(reward: str, settings: Mapping[str, Any]) -> rewards.Reward:
    name, _, rest = reward.partition(":")
    cls = lookup("genkit.rewards", rewards.Reward, name, setting="reward")
    told = parse_settings(f"reward {name!r}", rest, cls.Config.model_fields)
    usual = {"quantise": True} if "quantise" in cls.Config.model_fields else {}
    return rewards.make(name, **{**usual, **settings, **told})
