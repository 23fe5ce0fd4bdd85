"""The resize rules in use for evaluation networks. They move distances more than any other detail of a protocol."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def clean(images: Tensor, size: int) -> Tensor:
    """Bicubic, antialiased, not rounded, clipped to 0..255: PIL on float channels, clean-fid's ``clean``."""
    # In float64, where torch agrees with PIL to 2e-5 grey levels; in float32 it places its taps 5e-3 off.
    x = images.cpu() if images.device.type == "mps" else images  # which has no float64
    x = F.interpolate(x.double(), (size, size), mode="bicubic", align_corners=False, antialias=True)
    return x.clamp(0, 255).float().to(images.device)


def pil(images: Tensor, size: int) -> Tensor:
    """Bicubic, antialiased, rounded to eight bits after each of two passes: PIL on images, dgm-eval, CMMD."""
    rows = [Image.fromarray(row).resize((size, size), Image.Resampling.BICUBIC) for row in _as_arrays(images)]
    return torch.from_numpy(np.stack([np.array(row) for row in rows])).permute(0, 3, 1, 2).float().to(images.device)


def bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic, antialiased, in float32, neither rounded nor clipped: EDM2's rule for DINOv2."""
    return F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False, antialias=True)


def antialias(images: Tensor, size: int) -> Tensor:
    """Bilinear, half-pixel centres, antialiased: torchmetrics since 1.9."""
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)


def pytorch(images: Tensor, size: int) -> Tensor:
    """Bilinear, half-pixel centres, not antialiased: pytorch-fid, clean-fid's ``legacy_pytorch``."""
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)


def tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear between the pixels at ``i * H / size``, neither half-pixel nor antialiased: TensorFlow 1, and with it
    the first FID code, ADM's evaluator, torch-fidelity and clean-fid's ``legacy_tensorflow``.
    """
    x = images.float()
    for axis in (3, 2):
        length = x.shape[axis]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size)
        low = place.long()
        weight = (place - low).view((-1,) + (1,) * (3 - axis))
        below = x.index_select(axis, low)
        x = below + (x.index_select(axis, (low + 1).clamp(max=length - 1)) - below) * weight
    return x


# By name: uint8 (B, 3, H, W) and a side to float32 (B, 3, side, side) on 0..255.
RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    rule.__name__: rule for rule in (tf1, antialias, pytorch, clean, pil, bicubic)
}


def _as_arrays(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
