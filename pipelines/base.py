"""What genkit's pipelines share: any network with an adapter, its classic components, a guider, and THE loop."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from genkit.denoisers import Condition, Denoiser, from_pipeline
from genkit.denoisers.network import adapter_of, texts, unwrap
from genkit.guidance.base import Guider
from genkit.guidance.cfg import CFG
from genkit.pipelines import classic
from genkit.pipelines.lora import LoraLoading
from genkit.registry import unknown
from genkit.sampling import Particles, State, check_fit, set_timesteps, trajectory

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
SAFETY_PARTS = ("image_encoder", "feature_extractor", "safety_checker")


@dataclass
class PipelineOutput(BaseOutput):
    """``images`` in the form asked for, ``network_calls``, the evaluations that each of them took, and, where there is
    a safety checker, what it found in each."""

    images: Any
    network_calls: int
    nsfw_content_detected: list[bool] | None = None


@dataclass
class Run:
    """A finished run: its last ``state``, the ``denoiser`` that counted the calls, the ``condition`` of its samples."""

    state: State
    denoiser: Denoiser
    condition: Condition


def with_parts(init):
    """Give a pipeline's ``__init__(self, *, more=None, **parts)`` the signature that names all of its components."""
    (own, *more, _) = inspect.signature(init).parameters.values()
    (_, *parts) = inspect.signature(DenoiserPipeline.__init__).parameters.values()
    init.__signature__ = inspect.Signature([own, *(p.replace(kind=p.KEYWORD_ONLY) for p in parts), *more])
    return init


class DenoiserPipeline(LoraLoading, DiffusionPipeline):
    """A pipeline around any network that has an adapter (:func:`genkit.denoisers.wrap`).

    A subclass says in its ``__call__`` what it is asked for; this class has the rest. Prompts go through Diffusers' own
    pipeline of the same components (:attr:`classic`).

    Args:
        scheduler, vae, unet, transformer, text_encoder ... tokenizer_3, image_encoder, feature_extractor,
            safety_checker: the components of the pipeline that the network comes from; ``unet`` or ``transformer``.
        guider: used unless a call brings its own; ``None`` follows the conditional prediction.
        force_zeros_for_empty_prompt, add_watermarker: SDXL's settings, as in Diffusers.
        id2label: names of the classes by number, as strings (JSON keys), for :meth:`get_label_ids`.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->unet->transformer->vae"
    _exclude_from_cpu_offload = ["safety_checker"]
    _optional_components = ["vae", "unet", "transformer", *TEXT_PARTS, *SAFETY_PARTS, "guider"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False

    def __init__(
        self,
        scheduler,
        vae=None,
        unet=None,
        transformer=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
        safety_checker=None,
        guider=None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            unet=unet,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            safety_checker=safety_checker,
            guider=guider,
        )
        self.register_to_config(
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
            id2label=id2label,
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None, **overrides):
        """This pipeline around the components of another, shared and not copied.

        Args:
            pipeline: any Diffusers pipeline whose network has an adapter.
            torch_dtype: convert the components (those of ``pipeline`` too); by default nothing is converted.
            overrides: components and settings in place of the other's.
        """
        accepted = set(inspect.signature(cls.__init__).parameters) - {"self"}
        for name in overrides:
            if name not in accepted:
                raise ValueError(unknown(f"{cls.__name__}.from_pipe: argument", name, accepted))
        given = {**pipeline.config, **pipeline.components, **overrides}
        new = cls(**{k: v for k, v in given.items() if k in accepted})
        return new if torch_dtype is None else new.to(dtype=torch_dtype)

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def network(self) -> Any:
        """The denoising network, a module.

        Raises:
            ValueError: none with an adapter.
        """
        parts = self.components
        for part in (parts.get("unet"), parts.get("transformer")):
            if isinstance(part, nn.Module) and adapter_of(part):
                return part
        names = {name: type(part).__name__ for name, part in parts.items() if isinstance(part, nn.Module)}
        raise ValueError(f"{type(self).__name__} holds no network with an adapter as unet or transformer, but {names}")

    @property
    def _network_config(self) -> Any:
        return unwrap(self.network).config

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told a guidance scale that was distilled into it."""
        config = self._network_config
        return bool(getattr(config, "guidance_embeds", False) or getattr(config, "time_cond_proj_dim", None))

    @property
    def classic(self) -> Any:
        """Diffusers' pipeline of the same components, for what is done there (``load_lora_weights`` ...); ``None`` for
        a network that takes no prompts."""
        return classic.classic_pipeline(self.network, {**self.config, **self.components})

    @cached_property
    def image_processor(self) -> VaeImageProcessor:
        """Tensors to images and back."""
        vae = self.components.get("vae")
        return VaeImageProcessor(vae_scale_factor=1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1))

    @property
    def interrupt(self) -> bool:
        """Whether the run was told to stop after the current step."""
        return self._interrupt

    def denoiser(self) -> Denoiser:
        """The network on the path of the scheduler.

        Raises:
            ValueError: the two do not fit.
        """
        return from_pipeline(self)

    # -- inputs -------------------------------------------------------------------------------------------------

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        **arguments: Any,
    ) -> Condition:
        """What the network is told of prompts or class labels, with the unconditional branch that guiders use.

        Args:
            prompt: one or several, for a network that takes prompts.
            class_labels: numbers of the classes, for one that takes these; nothing for an unconditional network.
            height, width: of the image in pixels (SDXL tells its network).
            arguments: what the network's adapter and the classic pipeline's ``encode_prompt`` take beside these, such
                as ``negative_prompt``, ``prompt_2``, ``max_sequence_length``.

        Raises:
            ValueError: prompts for a network that takes labels or the reverse, an unknown argument, or lists of
                different lengths.
        """
        denoiser, pipe = self.denoiser(), self.classic
        adapter: Any = adapter_of(self.network)
        if pipe is None:
            given = [k for k, v in {"prompt": prompt, **arguments}.items() if v is not None]
            if given:
                raise ValueError(f"{given}: {type(unwrap(self.network)).__name__} takes class_labels alone")
            return denoiser.encode(self, class_labels=class_labels)
        if class_labels is not None or prompt is None:
            raise ValueError(
                f"prompt={prompt!r}, class_labels={class_labels}: {type(unwrap(self.network)).__name__} takes a prompt"
            )
        own = set(inspect.signature(adapter.encode).parameters) - {"self", "pipe", "more"}
        hidden = {"device", "num_images_per_prompt", "do_classifier_free_guidance"}
        accepted = own | {
            name
            for name in inspect.signature(pipe.encode_prompt).parameters
            if name not in hidden and not name.endswith("_embeds")  # which a condition brings
        }
        n = len(texts(prompt))
        for name, value in arguments.items():
            if name not in accepted:
                raise ValueError(unknown(f"{type(self).__name__}: argument", name, accepted))
            if "prompt" in name and isinstance(value, (list, tuple)) and len(value) != n:
                raise ValueError(f"{name} has {len(value)} texts for {n} prompts; give one, or one a prompt")
        if n == 0 or all(pipe.components.get(k) is None for k in TEXT_PARTS[::2]):
            raise ValueError(f"prompt={prompt!r}: at least one prompt and one text encoder are needed")
        sizes = {"height": height, "width": width}
        inputs = {**{k: v for k, v in sizes.items() if k in own}, **arguments}
        return denoiser.encode(pipe, prompt=prompt, **inputs)

    def get_label_ids(self, labels: Sequence[str]) -> list[int]:
        """Numbers of the classes called ``labels``; names in ``id2label`` may list synonyms, separated by commas.

        Raises:
            ValueError: a name that is not in ``id2label``.
        """
        named = (self.config.get("id2label") or {}).items()
        known = {word.strip(): int(i) for i, name in named for word in (name, *name.split(","))}
        missing = [label for label in labels if label not in known]
        if missing:
            raise ValueError(f"labels={missing}: accepted are {sorted(known)}")
        return [known[label] for label in labels]

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """``(C, H, W)`` of what the network sees, for an image of this size in pixels.

        Raises:
            ValueError: a size that the network or the autoencoder does not take.
        """
        pipe, config = self.classic, self._network_config
        if pipe is not None:
            return classic.latent_shape(pipe, height, width)
        factor = self.image_processor.config.vae_scale_factor
        size = config.sample_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels not in (None, size * factor):
                raise ValueError(f"{name}={pixels}: the network makes images of {size * factor} pixels")
        return config.in_channels, size, size

    # -- the run ------------------------------------------------------------------------------------------------

    def _generate(
        self,
        num_inference_steps: int,
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        condition: Condition | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        guider: Guider | None = None,
        guidance_scale: float | None = None,
        particles: Particles | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **arguments: Any,
    ) -> Run:
        """From what was asked to the last state of the loop; whatever cannot work is refused before it begins."""
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        strange = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if strange:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={sorted(strange)}: accepted are {self._callback_tensor_inputs}"
            )
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count}: must be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: accepted are {', '.join(OUTPUT_TYPES)}")
        guider = self._choose_guider(guider, guidance_scale, arguments)
        denoiser, shape = self.denoiser(), self.sample_shape(height, width)
        check_fit(denoiser, self.scheduler, guider)
        if condition is None:
            inputs = {"class_labels": class_labels, "height": height, "width": width, **arguments}
            condition = self.encode(prompt, **inputs)
        elif prompt is not None or class_labels is not None or arguments:
            raise ValueError("condition brings what prompt, class_labels and their arguments would say; give one")
        condition = condition.repeat(num_images_per_prompt)
        n = len(condition) or (1 if batch_size is None else batch_size) * num_images_per_prompt
        if n < 1 or condition.values and not len(condition):
            raise ValueError(
                f"class_labels={class_labels}, batch_size={batch_size}: at least one image must be asked for"
            )
        device = self._execution_device
        x = self._noise((n, *shape), generator, latents, device)
        self._set_schedule(shape, num_inference_steps, device, sigmas, timesteps)
        extra: dict[str, Any] = {} if eta is None else {"eta": eta}
        steps = trajectory(
            denoiser,
            self.scheduler,
            x * getattr(self.scheduler, "init_noise_sigma", 1.0),
            condition.to(device),
            guider=guider,
            particles=particles,
            callback=self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            generators=generator,
            **extra,
        )
        self._interrupt = False
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for state in steps:
                last = state
                bar.update()
                if self._interrupt:
                    break
        return Run(last, denoiser, condition)

    def told(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that :meth:`encode` takes."""
        calls = [vars(cls)["__call__"] for cls in type(self).__mro__ if "__call__" in vars(cls)]
        others = {name for f in (*calls, DenoiserPipeline._generate) for name in inspect.signature(f).parameters}
        size = {name: arguments[name] for name in ("height", "width") if name in arguments}
        return {k: v for k, v in arguments.items() if k not in others} | size

    def _choose_guider(self, guider, guidance_scale, arguments: dict[str, Any]) -> Guider | None:
        """The call's guider; the scale goes to networks that embed one, or else stands for classifier-free guidance."""
        if guidance_scale is None:
            return guider if guider is not None else self.components.get("guider")
        if self.embeds_guidance:
            arguments["guidance_scale"] = guidance_scale
            return guider if guider is not None else self.components.get("guider")
        if guider is not None:
            raise ValueError(
                f"guidance_scale={guidance_scale} stands for guider=CFG(guidance_scale={guidance_scale}), and "
                f"guider={type(guider).__name__} was given too; set the scale of that one"
            )
        return CFG(guidance_scale=guidance_scale)

    def _noise(self, shape: tuple[int, ...], generator, latents: Tensor | None, device) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for {shape[0]} images; give one, or one an image")
        dtype = torch.promote_types(self.network.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        return latents.to(device, dtype)

    def _set_schedule(self, shape: tuple[int, ...], num_inference_steps: int, device, sigmas, timesteps) -> None:
        pipe = self.classic
        if pipe is not None:
            classic.set_schedule(pipe, shape, num_inference_steps, device, sigmas, timesteps)
            return
        schedule = {k: v for k, v in {"sigmas": sigmas, "timesteps": timesteps}.items() if v is not None}
        if schedule:
            self.scheduler.set_timesteps(**schedule, device=device)
        else:
            set_timesteps(self.scheduler, num_inference_steps, device)

    def _callback(self, function, names: Sequence[str]) -> Callable[[State], State] | None:
        if function is None:
            return None

        def callback(state: State) -> State:
            given = {name: {"latents": state.x}[name] for name in names}
            answer = function(self, state.i, state.timestep, given) or {}
            return replace(state, x=answer.get("latents", state.x))

        return callback

    def _finish(self, run: Run, output_type: str) -> PipelineOutput:
        """The last samples as images."""
        x, pipe, found = run.state.x, self.classic, None
        if output_type == "latent":
            images: Any = x
        else:
            if self.components.get("vae") is not None:
                x = classic.decode(self.vae, x, upcast=classic.is_xl(pipe))
            if getattr(pipe, "safety_checker", None) is not None:
                x, found = pipe.run_safety_checker(x, x.device, self.network.dtype)
            if getattr(pipe, "watermark", None) is not None:
                x = pipe.watermark.apply_watermark(x)
            clear = None if found is None else [not bad for bad in found]
            images = self.image_processor.postprocess(x.float(), output_type=output_type, do_denormalize=clear)
        self.maybe_free_model_hooks()
        return PipelineOutput(images=images, network_calls=run.denoiser.calls, nsfw_content_detected=found)
