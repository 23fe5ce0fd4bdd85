"""How surely a small classifier sees the wanted class in an 8x8 digit."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit.networks.digits_classifier import DigitsClassifier
from genkit.rewards.base import Prompts, Reward, RewardConfig

ASSETS = Path(__file__).parents[1] / "assets"


class DigitsConfig(RewardConfig):
    """``wanted``: the class; unset is the one that each sample was asked for. ``network``: ``trained``, three
    convolutions, to train on; or ``held_out``, fully connected and taught on the other half of the digits, to watch.
    """

    wanted: int | None = Field(None, ge=0, le=9)
    network: Literal["trained", "held_out"] = "trained"


class DigitsReward(Reward):
    """``log p(class | image)`` of 8x8 one-channel digits.

    The networks are shipped (``genkit/assets/train_digits_rewards.py``). Neither is the one that generated digits are
    evaluated by, and no image was shown to both of them.

    Raises:
        ValueError: images of another size; labels that are not 0 to 9.
    """

    Config = DigitsConfig
    scale = (-10.0, 0.0)

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.takes = "labels" if self.config.wanted is None else None
        weights = ASSETS / f"digits_{self.config.network}.safetensors"
        record = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        with torch.device("meta"):  # initial weights would be drawn from the caller's random stream
            self.model = network(self.config.network, **record["config"])
        self.model.load_state_dict(load_file(weights), assign=True)

    def check_size(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) != (1, 8, 8):
            raise ValueError(f"reward digits: images of shape {tuple(shape)}; accepted are those of digits, (1, 8, 8)")

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        self.check_size(tuple(images.shape[1:]))
        if self.config.wanted is not None:
            classes = torch.full((len(images),), self.config.wanted, device=images.device)
        else:
            assert isinstance(prompts, Tensor)  # takes = "labels"
            if len(prompts) and not 0 <= int(prompts.min()) <= int(prompts.max()) <= 9:
                raise ValueError(f"reward digits: labels {prompts.unique().tolist()}; accepted are 0 to 9")
            classes = prompts.to(images.device)
        logits = self.model((2 * images - 1).to(next(self.model.parameters()).dtype))
        return logits.log_softmax(1).gather(1, classes[:, None])[:, 0]


def network(name: str, **settings: Any) -> nn.Module:
    """The classifier called ``name``: ``(B, 1, 8, 8)`` in [-1, 1] to logits ``(B, 10)``."""
    if name == "trained":
        return DigitsClassifier(**settings)
    width = settings["hidden"]
    drop = nn.Dropout(settings["dropout"])
    layers = (nn.Linear(64, width), nn.SiLU(), drop, nn.Linear(width, width), nn.SiLU(), drop, nn.Linear(width, 10))
    return nn.Sequential(nn.Flatten(), *layers)
