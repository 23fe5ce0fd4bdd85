"""What every reward needs to be made: folders with tiny models, written once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genkit.rewards import make
from tests.rewards import published, tiny

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
        return self.layers(images).square().mean((1, 2, 3))


number = 3
"""


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> dict[str, dict]:
    """``{name: settings}`` with which every reward can be made here."""
    folder: Path = tmp_path_factory.mktemp("rewards")
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
        "digits": {},
        "thickness": {},
        "function": dict(path=f"{folder / 'mine.py'}:Net", differentiable=True, settings={"width": 4}),
        "hpsv2": dict(model=str(folder / "hps"), tokenizer=clip),
        "image_reward": dict(model=str(folder / "reward.safetensors"), tokenizer=bert),
        "jpeg": {},
        "pick_score": dict(model=clip, tokenizer=clip),
    }


@pytest.fixture
def reward(settings):
    """``reward(name, **more)``: made as users make it."""
    return lambda name, **more: make(name, **settings[name] | more)
