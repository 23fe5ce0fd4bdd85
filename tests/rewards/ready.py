"""What the tests over all rewards must be told of some; there is no other list.

A reward that can be made without settings, and scores different pictures of 40 x 56 pixels differently, needs no line.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.rewards import published, tiny


def various(*shape: int) -> Tensor:
    """``(4, *shape)`` on [0, 1] of different content: noise, weaker noise, a gradient, one grey."""
    noise = tiny.images(2, *shape)
    slope = torch.linspace(0.1, 0.8, shape[-1]).expand(shape)
    return torch.stack([noise[0], 0.3 + 0.3 * noise[1], slope, torch.full(shape, 0.7)])


# Images, where a reward does not take those of everyone, or scores some of them alike: (B, C, H, W), B at most 4.
IMAGES = {"digits": various(1, 8, 8)}

FUNCTIONS = """
import torch
from torch import nn


def brightness(images, power=1.0):
    return images.mean((1, 2, 3)) ** power


def length(images, prompts):
    return [float(len(text)) for text in prompts]


def stuck(images):
    return images.detach().mean((1, 2, 3))


def of_label(images, labels, scale):
    return images.mean((1, 2, 3)) * labels * scale


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images.expand(-1, 3, -1, -1)).square().mean((1, 2, 3))


number = 3
"""


def settings(folder: Path) -> dict[str, dict]:
    """``{name: settings}`` of rewards that need some to be made; their files are written to ``folder``."""
    clip = tiny.clip(folder / "clip")
    bert = tiny.bert_tokenizer(folder / "bert")
    for name in ("classifier", "head", "hps"):
        (folder / name).mkdir()
    torch.save(published.head(16).state_dict(), folder / "head" / "aesthetic-model.pth")
    torch.save({"state_dict": published.OpenCLIP(190).state_dict(), "epoch": 3}, folder / "hps/HPS_v2.1_compressed.pt")
    save_file(published.ImageRewardNet(200).state_dict(), folder / "reward.safetensors")
    (folder / "mine.py").write_text(FUNCTIONS)
    return {
        "aesthetic": dict(model=clip, head=str(folder / "head")),
        "classifier": dict(model=tiny.classifier(folder / "classifier"), wanted=1),
        "clip_score": dict(model=clip),
        "function": dict(path=f"{folder / 'mine.py'}:Net", differentiable=True, settings={"width": 4}),
        "hpsv2": dict(model=str(folder / "hps"), tokenizer=clip),
        "image_reward": dict(model=str(folder / "reward.safetensors"), tokenizer=bert),
        "pick_score": dict(model=clip, tokenizer=clip),
    }
