"""Class-conditional and unconditional images, in pixels or latents, from many steps or from a flow map's few."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit.denoisers import from_pipeline
from genkit.sampling import State, set_timesteps, trajectory


@dataclass
class ClassConditionalPipelineOutput(BaseOutput):
    """``images`` in the form asked for, and ``network_calls``, the evaluations that each of them took."""

    images: Any
    network_calls: int


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of given classes from a transformer on any scheduler that genkit has an interpolant for.

    Args:
        transformer: :class:`genkit.networks.dit.DiT` or any network with an adapter that takes class labels.
        scheduler: a Diffusers scheduler, or :class:`genkit.schedulers.flow_map.FlowMapScheduler` for a flow map.
        vae: decodes latents; ``None`` for pixels.
        guider: used unless a call brings its own; ``None`` follows the conditional prediction.
        id2label: names of the classes by number, as strings (JSON keys), for :meth:`get_label_ids`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guider"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer, scheduler, vae=None, guider=None, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guider=guider)
        self.register_to_config(id2label=id2label)
        factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    def get_label_ids(self, labels: list[str]) -> list[int]:
        """Numbers of the classes called ``labels``.

        Raises:
            ValueError: a name that is not in ``id2label``.
        """
        known = {name: int(i) for i, name in (self.config.id2label or {}).items()}
        missing = [label for label in labels if label not in known]
        if missing:
            raise ValueError(f"labels={missing}: accepted are {sorted(known)}")
        return [known[label] for label in labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor | None = None,
        num_inference_steps: int = 32,
        *,
        guider=None,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ClassConditionalPipelineOutput | tuple:
        """Generate one image a label.

        Args:
            class_labels: numbers of the classes; leave out for an unconditional network and give ``batch_size``.
            num_inference_steps: network evaluations without guidance; on the linear path at times ``1 - k/N``, which
                the scheduler then shifts.
            guider: a genkit guider for this call.
            num_images_per_label: images a label, next to each other.
            sigmas, timesteps: a schedule of your own in place of ``num_inference_steps``.
            generator: one, or one an image: then an image does not depend on its neighbours.
            latents: noise to start from, ``(B, C, H, W)``.
            output_type: ``pil``, ``np`` ``(B, H, W, C)`` in [0, 1], ``pt`` ``(B, C, H, W)`` in [0, 1], or ``latent``.
            callback_on_step_end: called as ``fn(pipe, i, timestep, {"latents": x})``; may return new latents, and may
                set ``pipe._interrupt = True`` to stop.

        Raises:
            ValueError: a label out of range, a batch of 0, a guider without an unconditional branch, parts that do
                not fit.
        """
        unknown_inputs = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown_inputs:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={sorted(unknown_inputs)}: "
                f"accepted are {self._callback_tensor_inputs}"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: accepted are pil, np, pt, latent")
        denoiser = from_pipeline(self)
        condition = denoiser.encode(self, class_labels=class_labels).repeat(num_images_per_label)
        n = len(condition) or (batch_size or 1) * num_images_per_label
        if class_labels is not None and not len(class_labels) or n < 1:
            raise ValueError(
                f"class_labels={class_labels}, batch_size={batch_size}: at least one image must be asked for"
            )
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(f"generator has {len(generator)} entries for {n} images; give one, or one an image")
        device, dtype = self._execution_device, torch.promote_types(self.transformer.dtype, torch.float32)
        config = self.transformer.config
        shape = (n, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        schedule = {k: v for k, v in {"sigmas": sigmas, "timesteps": timesteps}.items() if v is not None}
        if schedule:
            self.scheduler.set_timesteps(**schedule, device=device)
        else:
            set_timesteps(self.scheduler, num_inference_steps, device)
        x = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self._interrupt = False

        def callback(state: State) -> State:
            if callback_on_step_end is None:
                return state
            given = {name: {"latents": state.x}[name] for name in callback_on_step_end_tensor_inputs}
            answer = callback_on_step_end(self, state.i, state.timestep, given) or {}
            return replace(state, x=answer.get("latents", state.x))

        steps = trajectory(
            denoiser,
            self.scheduler,
            x,
            condition.to(device),
            guider=guider if guider is not None else self.guider,
            callback=callback,
            generators=generator,
        )
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for state in steps:
                x = state.x
                bar.update()
                if self._interrupt:
                    break
        self.maybe_free_model_hooks()
        images = self._decode(x, output_type)
        if not return_dict:
            return (images, denoiser.calls)
        return ClassConditionalPipelineOutput(images=images, network_calls=denoiser.calls)

    def _decode(self, x: Tensor, output_type: str):
        if output_type == "latent":
            return x
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x = self.vae.decode((x / self.vae.config.scaling_factor + shift).to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(x.float(), output_type=output_type)
