"""How sure an image classifier is of a class."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.registry import unknown
from genkit.rewards._loading import NetworkConfig
from genkit.rewards._preprocessing import Preprocessing
from genkit.rewards.base import Prompts, Reward


class ClassifierConfig(NetworkConfig):
    """``model``: anything that transformers' ``AutoModelForImageClassification`` loads, with its
    ``preprocessor_config.json``. ``wanted``: a class by index or name; without it, the label each image was asked for.
    """

    wanted: int | str | None = None


class Classifier(Reward):
    """``log p(wanted | image)``, by a log-softmax, whose gradient does not vanish where the class is unlikely.

    Raises:
        ValueError: a class that the model does not have, preprocessing that is not known.
    """

    Config = ClassifierConfig

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        from transformers import AutoModelForImageClassification
        from transformers.utils import cached_file

        source, revision = self.config.model, self.config.revision
        self.model = AutoModelForImageClassification.from_pretrained(
            source, revision=revision, dtype=self.config.torch_dtype
        )
        # Read as a file: transformers' own image processors may need torchvision.
        file = Path(cached_file(source, "preprocessor_config.json", revision=revision))
        self.preprocess = Preprocessing.from_settings(
            json.loads(file.read_text(encoding="utf-8")),
            antialias=self.config.antialias,
            quantise=self.config.quantise,
        )
        self.num_classes = self.model.config.num_labels
        self.wanted = None if self.config.wanted is None else self._index(self.config.wanted)
        self.takes = "labels" if self.wanted is None else None

    def score(self, images: Tensor, prompts: Prompts | None) -> Tensor:
        pixels = self.preprocess(images)
        logits = self.model(pixel_values=pixels.to(self.model.dtype)).logits
        chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        if self.wanted is not None:
            return chances[:, self.wanted]
        labels = torch.as_tensor(prompts, device=images.device)
        if labels.is_floating_point() or ((labels < 0) | (labels >= self.num_classes)).any():
            raise ValueError(
                f"classifier: labels {labels.tolist()}; accepted are integers from 0 to {self.num_classes - 1}"
            )
        return chances.gather(1, labels.long()[:, None])[:, 0]

    def _index(self, wanted: int | str) -> int:
        if isinstance(wanted, str):
            names = {name: index for index, name in self.model.config.id2label.items()}
            if wanted not in names:
                raise ValueError(unknown("wanted", wanted, names))
            return int(names[wanted])
        if not 0 <= wanted < self.num_classes:
            raise ValueError(f"wanted={wanted}: accepted are the names of classes and 0 to {self.num_classes - 1}")
        return wanted
