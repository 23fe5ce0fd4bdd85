"""From what a data source reads to what an objective takes."""

from typing import Any

import torch
from torch import Tensor

from genkit.data.base import Source
from genkit.denoisers import TwoTime
from genkit.denoisers.base import Condition, Denoiser
from genkit.denoisers.flux import Flux
from genkit.latents import compression
from genkit.rewards.base import Prompts
from genkit.rng import ItemRNG, hash_seed
from genkit.students import Student
from genkit.training.adapters import base_network
from genkit.training.objectives.base import Batch


class Inputs:
    """Batches of ``source`` as clean samples in the network's space, under its condition.

    Pictures are encoded where the pipeline has a VAE and the source gives what it takes; prompts by the pipeline's
    text encoders, the empty text being the unconditional branch; labels stay numbers. Everything random about item
    ``i`` is a function of ``(seed, i)``. Unless ``conditioned``, conditions are empty.

    Raises:
        ValueError: a source of the wrong shape, with too many classes, or without what the network is conditioned on.
    """

    def __init__(self, pipe, student: Denoiser, source: Source, seed: int, *, conditioned: bool = True):
        self.pipe, self.student, self.seed = pipe, student, hash_seed(seed, 0x766165)
        self.samples = source.sample_fields
        self.name = type(source).__name__
        shape, self.labels, self.prompts = _wanted(student)
        if not conditioned:
            self.labels, self.prompts = None, False
        self.shape = getattr(source.config, "sample_shape", None) or shape
        vae: Any = getattr(pipe, "vae", None)
        given = self.given = source.shape
        latents = vae is None or shape is None or given is None or given[0] == shape[0]
        self.vae: Any = None if latents else vae
        if given is None:
            if self.shape is None:
                raise ValueError(f"data={self.name}: the shape of the model's samples is not known; set sample_shape")
        elif self.vae is not None:
            if given[0] != vae.config.in_channels:
                raise ValueError(
                    f"data gives samples of shape {given}; the model takes latents of shape {shape}, or "
                    f"pictures of {vae.config.in_channels} channels"
                )
        elif shape is not None and (given[0] != shape[0] or (not self.prompts and given != shape)):
            raise ValueError(f"data gives samples of shape {given}, the model takes {shape}")
        if self.labels is not None and (source.num_classes or self.labels + 1) > self.labels:
            got = "no classes" if source.num_classes is None else f"{source.num_classes} classes"
            raise ValueError(f"data={self.name} gives {got}, the model takes class labels 0 to {self.labels - 1}")
        self._null_label = student.encode(pipe, class_labels=[0]).null_values if self.labels else None  # type: ignore

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of the network's samples, where it is known before any are read."""
        if self.given is None or self.vae is None:
            return self.given or self.shape
        factor = compression(self.vae)
        return (self.vae.config.latent_channels, *(side // factor for side in self.given[1:]))

    @torch.no_grad()
    def __call__(self, read: dict[str, Any], device: torch.device) -> Batch:
        """One micro-batch of the loader, on ``device``."""
        fields = {k: v.to(device, non_blocking=True) for k, v in read.items() if isinstance(v, Tensor)}
        index = fields["index"]
        x0 = fields["x0"] if "x0" in fields else torch.zeros((len(index), *(self.shape or ())), device=device)
        if self.vae is not None:
            x0 = self._encode(x0, index)
            for stream, name in enumerate(self.samples):
                if name != "x0":
                    fields[name] = self._encode(fields[name], index, stream)
        asked = self.asked(read)
        asked = asked.to(device) if isinstance(asked, Tensor) else asked
        return Batch(x0, self.condition(read, device), index, fields, asked)

    def asked(self, read: dict[str, Any]) -> Prompts | None:
        """The texts or labels of ``read``, whether or not the network is conditioned on them."""
        return read.get("prompts", read.get("class_labels"))

    @torch.no_grad()
    def condition(self, read: dict[str, Any], device: torch.device) -> Condition:
        """What the samples of ``read`` are conditioned on."""
        if self.labels:
            labels = read["class_labels"]
            assert self._null_label is not None
            null = self._null_label["class_labels"].cpu().expand(len(labels))
            return Condition({"class_labels": labels}, {"class_labels": null}).to(device, non_blocking=True)
        if self.prompts:
            if "prompts" not in read:
                raise ValueError(f"data={self.name} gives no prompts, which the model is conditioned on")
            return self.student.encode(self.pipe, prompt=read["prompts"], negative_prompt="")  # type: ignore
        return Condition()

    def _encode(self, pixels: Tensor, index: Tensor, stream: int = 0) -> Tensor:
        config = self.vae.config
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        noise = ItemRNG(self.seed + stream, index).normal(posterior.mean.shape[1:], dtype=posterior.mean.dtype)
        shift = getattr(config, "shift_factor", None) or 0.0
        return ((posterior.mean + posterior.std * noise - shift) * config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1] of samples in the network's space; ``x`` itself where there is no VAE."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return x
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return vae.decode((x / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0].float()

    def pixels(self, x0: Tensor) -> Tensor:
        """What the source gives, as pixels: latents are decoded, pictures are left as they are."""
        return x0 if self.vae is not None else self.decode(x0)


def synthetic_settings(pipe, student: Denoiser) -> dict[str, Any]:
    """Settings of the synthetic source that fit the student."""
    shape, labels, prompts = _wanted(student)
    if shape is None:
        raise ValueError("data=synthetic: the shape of the model's samples is not known; set data.shape")
    return dict(shape=shape, num_classes=labels or None, prompts=prompts)


def _wanted(student: Denoiser) -> tuple[tuple[int, ...] | None, int | None, bool]:
    """Shape of the student's samples, number of its classes, whether it takes prompts; by its network's config.

    Networks that take prompts take other sizes than the one named too.
    """
    if isinstance(student, Student):
        return student.shape, student.num_classes, False
    adapter = student.denoiser if isinstance(student, TwoTime) else student
    config: Any = getattr(base_network(student), "config", {})
    names = getattr(adapter, "condition_names", ())
    labels = config.get("num_classes") or (config.get("num_embeds_ada_norm") if "class_labels" in names else None)
    channels, size = config.get("in_channels"), config.get("sample_size")
    shape: tuple[int, ...] | None = None
    if isinstance(adapter, Flux):  # tokens of 2 x 2 patches, of any number
        shape = (channels // 4, 16, 16)
    elif channels and size:
        shape = (channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    return shape, labels, "prompt_embeds" in names
