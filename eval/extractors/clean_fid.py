"""clean-fid's own path: its resizers and networks, through the clean-fid package."""

import platform
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genkit.eval.extractors._resized import as_rgb
from genkit.eval.extractors.base import Extractor, Features, file_hash
from genkit.eval.extractors.inception import NAMES, URL
from genkit.registry import unknown

SCRIPT = "inception-2015-12-05.pt"
SCRIPT_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{SCRIPT}"
FOLDER = Path("./" if platform.system() == "Windows" else "/tmp")  # where clean-fid looks for it


class CleanFIDExtractor(Extractor):
    """The 2048 features that clean-fid computes, image by image as it does.

    Args:
        mode: ``clean``, ``legacy_pytorch`` or ``legacy_tensorflow``. Distances are called ``clean_fid``, and in the
            other modes ``clean_fid[mode]``.

    Raises:
        ValueError: another mode; clean-fid is not installed, or the network that it would download is not there (with
            the command that fetches it).

    Source: Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", arXiv 2104.11222.
    """

    dim = 2048

    def __init__(self, mode: str = "clean"):
        checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
        files = {
            "clean": (FOLDER / SCRIPT, SCRIPT_URL),
            "legacy_pytorch": (checkpoints / NAMES[0], URL),
            "legacy_tensorflow": (FOLDER / SCRIPT, SCRIPT_URL),
        }
        if mode not in files:
            raise ValueError(unknown("mode", mode, files))
        try:
            version = metadata.version("clean-fid")
        except metadata.PackageNotFoundError as error:
            raise ValueError("extractor 'clean_fid' needs clean-fid: pip install clean-fid") from error
        file, url = files[mode]
        if not file.is_file():
            raise ValueError(
                f"clean-fid would download {file.name}, which is not in {file.parent}. Fetch it with\n"
                f"  curl -L --create-dirs -o {file} {url}"
            )
        self.mode = mode
        self.id = f"clean-fid-{version}/{mode}/{file_hash(file)}"
        self.distance = "clean_fid" if mode == "clean" else f"clean_fid[{mode}]"
        with warnings.catch_warnings():  # clean-fid turns warnings off for the whole process
            from cleanfid.resize import build_resizer

            self.resizer = build_resizer(mode)
        self.to("cpu")

    def to(self, device: torch.device | str) -> "CleanFIDExtractor":
        from cleanfid.features import build_feature_extractor

        if getattr(self, "device", None) != torch.device(device):
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # one mode draws initial weights
                warnings.simplefilter("ignore")  # of torchvision's old arguments
                self.network = build_feature_extractor(self.mode, torch.device(device), use_dataparallel=False)
            self.device = torch.device(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        rows = as_rgb(images, "clean_fid").permute(0, 2, 3, 1).cpu().numpy()
        pixels = torch.from_numpy(np.stack([self.resizer(np.ascontiguousarray(row)) for row in rows]))
        pixels = pixels.permute(0, 3, 1, 2)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255 * 255  # the rounding of clean-fid's detour over [0, 1]
        return Features(self.network(pixels.to(images.device)))
