"""Weights of the networks behind perceptual distances, and the learned ones that other packages ship."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TORCHVISION = "torchvision"


def backbone_weights(setting: str, given: str | Path, torchvision_name: str) -> Mapping[str, Tensor]:
    """Of the file ``given``; or of torchvision, which downloads those for ImageNet unless they are in its cache.

    Raises:
        FileNotFoundError: no such file.
        ImportError: torchvision is asked for and not installed.
    """
    if given == TORCHVISION:
        from torchvision import models

        return getattr(models, torchvision_name).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    file = Path(given)
    if not file.is_file():
        raise FileNotFoundError(f"{setting}={str(given)!r} is neither a file of weights nor {TORCHVISION!r}")
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def shipped(*places: tuple[str, str]) -> Mapping[str, Tensor] | None:
    """The first file that is there, of ``(package, path within it)``: found without running the package."""
    for package, path in places:
        spec = importlib.util.find_spec(package)
        folders: Sequence[str] = (spec.submodule_search_locations or ()) if spec is not None else ()
        for folder in folders:
            if (file := Path(folder, path)).is_file():
                return torch.load(file, map_location="cpu", weights_only=True)
    return None


def check_pictures(x: Tensor, y: Tensor) -> None:
    """Raise ``ValueError`` unless both are pictures ``(B, 3 or 1, H, W)`` of one shape."""
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"pictures of shapes {tuple(x.shape)} and {tuple(y.shape)}: accepted are two (B, 3 or 1, H, W)"
        )
