"""Images as an autoencoder gives them back, and with them rFID, PSNR, SSIM and LPIPS of tokenizers."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from genkit._files import first_line
from genkit.eval.generated import name_of
from genkit.eval.inputs import ImageSet, Maker, UnreadableImage, uint8_kind
from genkit.eval.on_demand import Spool, evaluating
from genkit.eval.processes import gather, own
from genkit.latents import compression
from genkit.networks.tokenizer import ImageTokenizer
from genkit.quantizers.usage import CodeUsage

_BATCH = 32


def reconstructed_images(
    autoencoder: nn.Module | Callable[[Tensor], Tensor],
    images: ImageSet,
    *,
    batch_size: int = 32,
    name: str | None = None,
    folder: str | Path | None = None,
) -> ImageSet:
    """``decode(encode(images))``, in the order of ``images``, made when asked for and kept for as long as the set.

    From uint8 to [-1, 1] by x / 127.5 - 1, and back by round((x + 1) 127.5), clamped; some codes truncate, which
    darkens. Of a distribution of latents the mode is decoded, so nothing is random.

    Args:
        autoencoder: of Diffusers (``AutoencoderKL``, ``VQModel``, ``AutoencoderTiny``, ``AutoencoderDC`` ...), a
            :class:`genkit.networks.tokenizer.ImageTokenizer`, or any function of float ``(B, C, H, W)`` in [-1, 1].
        name: what results call it; by default its folder or class.
        folder: where the temporary file goes.

    Raises:
        ValueError: images of other channels or of a size that the autoencoder does not take, before any is made.
    """
    _, c, h, w = images.load(torch.tensor([_first_readable(images)])).shape
    config = getattr(autoencoder, "config", None)
    if config is not None:
        takes, factor = config.get("in_channels", c), compression(autoencoder)
        if takes != c:
            raise ValueError(f"{type(autoencoder).__name__} takes images of {takes} channels, {images.name} has {c}")
        if (h % factor or w % factor) and config.get("pad_mode") is None:  # tokenizers pad
            raise ValueError(
                f"{type(autoencoder).__name__} takes multiples of {factor} pixels, {images.name} is {w}x{h}; "
                "size and crop change that"
            )
    if name is None:
        known = getattr(config, "_name_or_path", None) or getattr(autoencoder, "__name__", None)
        name = name_of(str(known or type(autoencoder).__name__))
    model = Reconstruction(autoencoder, images, name)
    spool = Spool(model.make, images.n, (c, h, w), batch_size, folder)
    return ImageSet(
        f"{images.name} reconstructed by {name}",
        images.n,
        spool.load,
        images.labels,
        images.prompts,
        uint8_kind((c, h, w)),
        model=model,
        class_names=images.class_names,
    )


def load_autoencoder(folder: str | Path) -> nn.Module:
    """An autoencoder of Diffusers, or a tokenizer, from its folder or that of a pipeline that has it; or from the Hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a network that does not encode and decode.
    """
    path = Path(folder)
    subfolder = next((name for name in ("", "vae", "vqvae") if (path / name / "config.json").is_file()), None)
    if subfolder is None and (path.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(folder))):
        raise FileNotFoundError(f"{folder}: no config.json, nor one in vae/ or vqvae/: no autoencoder")
    try:
        config = {} if subfolder is None else json.loads((path / subfolder / "config.json").read_text())
        cls = ImageTokenizer if config.get("_class_name") == ImageTokenizer.__name__ else AutoModel
        with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they are given those there
            autoencoder = cls.from_pretrained(str(folder), subfolder=subfolder or None)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: not a network of Diffusers that can be read: {first_line(error)}") from error
    if not (hasattr(autoencoder, "encode") and hasattr(autoencoder, "decode")):
        raise ValueError(f"{folder} is a {type(autoencoder).__name__}, which does not encode and decode")
    return autoencoder


class Reconstruction(Maker):
    """An autoencoder, and the ``originals`` that it gives back."""

    def __init__(self, autoencoder: Any, originals: ImageSet, name: str):
        self.autoencoder, self.originals = autoencoder, originals
        self.made_with = {"model": name}

    def make(self, items: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """uint8 ``(B, C, H, W)``, and what is wrong with which row."""
        assert self.originals is not None
        bad: dict[int, str] = {}
        read: dict[int, Tensor] = {}
        for row, item in enumerate(items):
            try:
                read[row] = self.originals.load(torch.tensor([item]))
            except UnreadableImage as error:
                bad[row] = str(error)
        if not read:
            return torch.zeros(1, dtype=torch.uint8), bad
        given = torch.cat(list(read.values()))
        with evaluating([self.autoencoder]):
            back = self._reconstruct(given.float() / 127.5 - 1).float().cpu()
        if back.shape != given.shape:
            raise ValueError(
                f"{self.made_with['model']} makes {tuple(back.shape)} of {tuple(given.shape)}; expected the same shape"
            )
        bad |= {
            row: f"image {items[row]} as reconstructed by {self.made_with['model']} is NaN"
            for row, image in zip(read, back, strict=True)
            if image.isnan().any()
        }
        images = torch.zeros(len(items), *given.shape[1:], dtype=torch.uint8)
        images[list(read)] = ((back.nan_to_num() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return images, bad

    def check_codes(self) -> None:
        if not isinstance(self.autoencoder, ImageTokenizer):
            super().check_codes()

    def count_codes(self) -> CodeUsage:
        """Of every image that can be read, each once over all processes."""
        assert self.originals is not None
        if self.codes is None:
            usage = CodeUsage(self.autoencoder.quantizer.codebook_size)
            with evaluating([self.autoencoder]):
                for items in own(self.originals.n, _BATCH).split(_BATCH):
                    images = _readable(self.originals, items)
                    if len(images):
                        usage.update(self.autoencoder.encode(self._placed(images.float() / 127.5 - 1)).indices)
            counts = torch.stack(gather(usage.counts)).sum(0)
            self.codes = CodeUsage(len(counts))
            self.codes.counts = counts
        return self.codes

    def _placed(self, x: Tensor) -> Tensor:
        if isinstance(self.autoencoder, nn.Module):
            like = next(self.autoencoder.parameters(), x)
            x = x.to(like.device, like.dtype)
        return x

    def _reconstruct(self, x: Tensor) -> Tensor:
        x = self._placed(x)
        if isinstance(self.autoencoder, ImageTokenizer):
            return self.autoencoder(x).sample
        if not hasattr(self.autoencoder, "encode"):
            return self.autoencoder(x)
        encoded = self.autoencoder.encode(x)
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return self.autoencoder.decode(latents, return_dict=False)[0]


def _readable(images: ImageSet, items: Tensor) -> Tensor:
    """Those of ``items`` that can be read."""
    found = []
    for item in items.split(1):
        try:
            found.append(images.load(item))
        except UnreadableImage:  # counted and named in the notes
            continue
    return torch.cat(found) if found else torch.empty(0)


def _first_readable(images: ImageSet) -> int:
    for i in range(images.n):
        try:
            images.load(torch.tensor([i]))
            return i
        except UnreadableImage:
            continue
    raise ValueError(f"none of the {images.n} images of {images.name} can be read")
