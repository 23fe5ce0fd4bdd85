"""Image in, image out: a model refines a coarse reference (low resolution, blurred, a crude edit)."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from genkit.guidance.coarse import encode_reference, latent_masks, resize
from genkit.guidance.h_transform import HTransform
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput

Images = Image.Image | Tensor | numpy.ndarray | list[Image.Image]


class CoarseGuidedPipeline(DenoiserPipeline):
    """What a model makes of a coarse image, by the weighted h-transform.

    Nothing is trained, and nothing need be known of how the image became coarse: see
    :class:`genkit.guidance.h_transform.HTransform`. ``from_pretrained`` and ``from_pipe`` take any pipeline of Stable
    Diffusion 1, 2, XL, 3, Flux or DiT; see :class:`genkit.pipelines.base.DenoiserPipeline` for the components. A
    ``guider`` must be an ``HTransform``.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        exponent: float | Sequence[float] | None = None,
        masks: Sequence[Image.Image | Tensor] = (),
        mask_policy: str = "any",
        guider: HTransform | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> PipelineOutput | tuple:
        """Refine images.

        Args:
            image: one or several, PIL, ``(B, H, W, C)`` arrays or ``(B, C, H, W)`` tensors in [0, 1]; of any size, they
                are resized (bicubic).
            prompt, class_labels: what the network is told, by which of the two it takes: one for all images, or one an
                image; neither for an unconditional network.
            exponent: ``a`` of the reference's weight ``sigma^a``, larger for a weaker reference; with masks one a
                region. The guider's by default.
            masks: regions, as images or tensors ``(1 or B, 1, H, W)`` of 0 and 1; the rest is one region more.
            mask_policy: a latent belongs to the first region that covers ``any`` or ``all`` of its pixels.
            guider: an ``HTransform`` for this call, with its combination rule inside (``rule={"name": "apg"}``).
            guidance_scale: of classifier-free guidance; for networks that embed it (FLUX.1-dev) that scale.
            num_images_per_prompt: images an image, next to each other.
            height, width: of the result in pixels; by default what the network was trained for.
            arguments: those of :class:`genkit.pipelines.text_to_image.TextToImagePipeline`.

        Raises:
            ValueError: an image of other channels, numbers of images and prompts that do not fit, masks that are not
                one fewer than the exponents; before the network is first called.
        """
        shape, device = self.sample_shape(height, width), self._execution_device
        factor = self.image_processor.config.vae_scale_factor
        size = (shape[1] * factor, shape[2] * factor)
        pixels = self._pixels(image).to(device)
        vae = self.components.get("vae")
        reference = resize(pixels, size) if vae is None else encode_reference(vae, pixels, size)
        given: dict[str, Any] = {"reference": _repeated(reference, num_images_per_prompt)}
        if masks:
            made = latent_masks([_mask(m).to(device) for m in masks], shape[1:], policy=mask_policy)
            given["masks"] = [_repeated(mask, num_images_per_prompt) for mask in made]
        rule = self._rule(guider, exponent, None if self.embeds_guidance else guidance_scale)
        run = self._generate(
            num_inference_steps,
            prompt=_for_each(prompt, len(pixels)),
            class_labels=_for_each(class_labels, len(pixels)),
            batch_size=len(pixels),
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            guider=rule.using(**given),
            guidance_scale=guidance_scale if self.embeds_guidance else None,
            output_type=output_type,
            **arguments,
        )
        output = self._finish(run, output_type)
        return output if return_dict else (output.images, output.network_calls)

    def _pixels(self, image: Images) -> Tensor:
        """``(B, C, H, W)`` in [-1, 1]."""
        vae = self.components.get("vae")
        channels = self._network_config.in_channels if vae is None else vae.config.get("in_channels", 3)
        gray = channels == 1
        processor = VaeImageProcessor(do_resize=False, do_convert_rgb=not gray, do_convert_grayscale=gray)
        if isinstance(image, Tensor) and image.is_floating_point() and image.amin() < 0:
            raise ValueError(f"image has values down to {float(image.amin()):g}: accepted are tensors in [0, 1]")
        pixels = processor.preprocess(image)
        if pixels.shape[1] != channels:
            raise ValueError(f"image has {pixels.shape[1]} channels, the model {channels}")
        return pixels

    def _rule(self, guider, exponent, guidance_scale: float | None) -> HTransform:
        """The guider of this call."""
        guider = guider if guider is not None else self.components.get("guider")
        if guider is None:
            return HTransform(exponent=exponent, guidance_scale=1.0 if guidance_scale is None else guidance_scale)
        if not isinstance(guider, HTransform):
            raise ValueError(
                f"guider={type(guider).__name__}: accepted is an HTransform, with the other as its rule: "
                "HTransform(rule={'name': ..., ...})"
            )
        if guidance_scale is not None and guider.rule is not None:
            raise ValueError(f"guidance_scale={guidance_scale}: the guider's rule={guider.rule} has a scale of its own")
        changes = {"exponent": exponent, "guidance_scale": guidance_scale}
        return guider.new(**{name: value for name, value in changes.items() if value is not None})


def _for_each(value: Any, count: int) -> Any:
    """``value`` for each of ``count`` images: one for all, or one an image."""
    if value is None:
        return None
    if isinstance(value, (str, int)):
        return [value] * count
    if len(value) not in (1, count):
        raise ValueError(f"{len(value)} prompts or labels for {count} images; give one, or one an image")
    return value if len(value) == count else [value[0]] * count


def _repeated(value: Tensor, n: int) -> Tensor:
    return value if len(value) == 1 else value.repeat_interleave(n, dim=0)


def _mask(mask: Image.Image | Tensor) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    return torch.from_numpy(numpy.asarray(mask.convert("L")) > 127)[None, None]
