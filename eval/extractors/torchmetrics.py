"""torchmetrics' own path: the network of its FrechetInceptionDistance, or one given to it."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.eval.extractors._resized import as_rgb, state_hash
from genkit.eval.extractors.base import Extractor, Features
from genkit.eval.extractors.inception import NAMES

URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAMES[1]}"


class TorchmetricsExtractor(Extractor):
    """The features that ``torchmetrics.image.fid.FrechetInceptionDistance`` has of uint8 images.

    Args:
        network: any module of uint8 ``(B, 3, H, W)`` to features ``(B, d)``, as its ``feature``; if None its own
            Inception network, and distances are called ``torchmetrics_fid``.
        weights: of that one: a file; if None it must be where torch.hub keeps its files.
        antialias: of that one's resizing: the default since torchmetrics 1.9; without, which is all that older versions
            do, ``torchmetrics_fid[tf1]``.

    Raises:
        ValueError: torchmetrics is not installed, or torch-fidelity, which has its network; no weights (with the
            command that fetches them); settings of its own network beside another.
    """

    def __init__(
        self, network: nn.Module | None = None, weights: str | Path | None = None, antialias: bool | None = None
    ):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ValueError("extractor 'torchmetrics' needs torchmetrics: pip install torchmetrics") from error
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"network={network!r}: accepted is a torch.nn.Module; leave it out for torchmetrics' own")
        if network is not None and (weights is not None or antialias is not None):
            raise ValueError(
                f"weights={weights}, antialias={antialias} are of torchmetrics' own network, not of others"
            )
        made: Any
        with torch.random.fork_rng(devices=[]):  # it draws initial weights, or a picture to count features with
            if network is not None:
                made = FrechetInceptionDistance(feature=network)
            else:
                antialias = True if antialias is None else antialias
                made = _own(FrechetInceptionDistance, weights, antialias)
        self.network: nn.Module = made.inception.eval().requires_grad_(False)
        self.dim = len(made.real_features_sum)
        rule = "given" if network is not None else "antialias" if antialias else "tf1"
        self.id = f"torchmetrics-{type(self.network).__name__}/{rule}/{state_hash(self.network.state_dict())}"
        if network is None:
            self.distance = "torchmetrics_fid" if antialias else "torchmetrics_fid[tf1]"

    def to(self, device: torch.device | str) -> "TorchmetricsExtractor":
        self.network.to(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        return Features(self.network(as_rgb(images, "torchmetrics")).float())


def _own(metric: Any, weights: str | Path | None, antialias: bool) -> Any:
    options: dict[str, Any] = {"feature": 2048}
    if "antialias" in inspect.signature(metric).parameters:
        options["antialias"] = antialias
    elif antialias:
        raise ValueError(
            "antialias=True needs torchmetrics 1.9: pip install --upgrade torchmetrics; or antialias=False"
        )
    default = Path(torch.hub.get_dir()) / "checkpoints" / NAMES[1]
    file = default if weights is None else Path(weights).expanduser()
    if not file.is_file():
        raise ValueError(
            f"extractor 'torchmetrics' has no weights: there is no {file}. Fetch them with\n"
            f"  curl -L --create-dirs -o {default} {URL}"
        )
    try:
        return metric(feature_extractor_weights_path=str(file), **options)
    except ModuleNotFoundError as error:
        raise ValueError("extractor 'torchmetrics' needs torch-fidelity: pip install torch-fidelity") from error
