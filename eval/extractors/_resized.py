"""What extractors with a network of one input size share: RGB, a resize rule by name, and names that say which."""

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.eval.extractors.base import Extractor, Features, check_uint8
from genkit.eval.resize import RULES
from genkit.registry import unknown

_AT_ONCE = 64  # large pictures: more would fill memory and gain nothing


class ResizedExtractor(Extractor):
    """Features of a network that sees images, grey ones three times, brought to one size by the rule ``resize``.

    ``id`` is ``name/resize/weights``, and ``distance`` is that of the literature with the literature's rule, ``usual``;
    with another one it is ``distance[rule]``.

    Raises:
        ValueError: a rule that :mod:`genkit.eval.resize` does not have.
    """

    usual: ClassVar[str]

    def __init__(self, network: nn.Module, *, name: str, weights: str, distance: str, size: int, resize: str):
        self.network = network.eval().requires_grad_(False)
        self.size = size
        self._name, self._weights, self._distance = name, weights, distance
        self._take(resize)

    def _take(self, resize: str) -> None:
        check_rule(resize)
        self.resize = resize
        self.id = f"{self._name}/{resize}/{self._weights}"
        self.distance = self._distance if resize == self.usual else f"{self._distance}[{resize}]"

    def with_resize(self, resize: str) -> "ResizedExtractor":
        """The same network behind another rule."""
        other = copy.copy(self)
        other._take(resize)
        return other

    def to(self, device: torch.device | str) -> "ResizedExtractor":
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        images = self.prepare(as_rgb(images, self._name))
        seen = [self.see(RULES[self.resize](some, self.size)) for some in images.split(_AT_ONCE)]
        logits = [some.logits for some in seen if some.logits is not None]
        return Features(torch.cat([some.features for some in seen]), torch.cat(logits) if logits else None)

    def prepare(self, images: Tensor) -> Tensor:
        """What happens to images before they are resized: nothing, mostly."""
        return images

    @abstractmethod
    def see(self, pixels: Tensor) -> Features:
        """Float ``(B, 3, size, size)`` on 0..255 to features."""


def check_rule(resize: str) -> None:
    """Raise ``ValueError`` for a rule that there is not: called before networks are read."""
    if resize not in RULES:
        raise ValueError(unknown("resize", resize, RULES))


def as_rgb(images: Tensor, extractor: str) -> Tensor:
    """``(B, 3, H, W)``, of grey images too. Raises ``ValueError`` where it is not uint8, or of other channels."""
    check_uint8(images, extractor)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"extractor {extractor!r} takes images (B, 3 or 1, H, W), got {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def state_hash(state: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of tensors by name, of whichever file they came from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
