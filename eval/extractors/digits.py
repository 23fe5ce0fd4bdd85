"""Features of 8x8 digits from the small classifier that is shipped with the package."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from genkit.eval.extractors.base import Extractor, Features, check_images, file_hash
from genkit.networks.digits_classifier import DigitsClassifier

WEIGHTS = Path(__file__).parents[1] / "assets" / "digits_classifier.safetensors"


class DigitsExtractor(Extractor):
    """128 features and 10 class logits of ``DigitsClassifier``; images must be 1x8x8."""

    def __init__(self) -> None:
        record = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
        with torch.device("meta"):  # initial weights would be drawn from the caller's random stream
            self.network = DigitsClassifier.from_config(record["config"]).eval()
        self.network.load_state_dict(load_file(WEIGHTS), assign=True)
        self.training = record["training"]
        self.dim, self.num_classes = self.network.feature_dim, self.network.config.num_classes
        self.id = f"digits/no-resize/{file_hash(WEIGHTS)}"

    def to(self, device: torch.device | str) -> "DigitsExtractor":
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        check_images(images, channels=1, size=(8, 8), extractor="digits")
        features = self.network.features(images.float() / 127.5 - 1)
        return Features(features, self.network.head(features))
