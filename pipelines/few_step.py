"""Images in a few jumps of a flow map that was distilled from a text-to-image or class-conditional model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit._flow_map_files import fuse_lora, load_flow_map
from genkit.denoisers import Condition, FlowMap, TwoTime, from_pipeline
from genkit.denoisers.network import unwrap
from genkit.pipelines.base import DenoiserPipeline, PipelineOutput, with_parts
from genkit.schedulers.flow_map import FlowMapScheduler


class FewStepPipeline(DenoiserPipeline):
    """A teacher's pipeline with a student in it: one network call a step, guidance trained in::

        pipe = FewStepPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
        pipe.load_flow_map("outputs/student/flow_map")
        image = pipe("a lighthouse", num_inference_steps=4).images[0]

    Args:
        gap_embedder: :class:`genkit.denoisers.two_time.GapEmbedder`, what makes a flow map of a network of one time;
            ``None`` for a network that has two, and before :meth:`load_flow_map`.
        parts: see :class:`genkit.pipelines.base.DenoiserPipeline`. ``scheduler`` is a
            :class:`genkit.schedulers.flow_map.FlowMapScheduler`, or until a student is loaded the teacher's.
    """

    model_cpu_offload_seq = "gap_embedder->" + DenoiserPipeline.model_cpu_offload_seq
    _optional_components = [*DenoiserPipeline._optional_components, "gap_embedder"]
    _exclude_from_cpu_offload = [*DenoiserPipeline._exclude_from_cpu_offload, "gap_embedder"]
    _flow_map: TwoTime | None = None

    @with_parts
    def __init__(self, *, gap_embedder=None, **parts):
        super().__init__(**parts)
        self.register_modules(gap_embedder=gap_embedder)

    def load_flow_map(self, folder_or_repo_id: str | Path) -> None:
        """Put a student (what :func:`genkit.hub.save_flow_map` wrote) into the pipeline.

        Its weights are written into the teacher's network, a LoRA fused, so that :meth:`save_pretrained` saves a
        pipeline that needs no other file. The scheduler becomes one of jumps on the teacher's path.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: there is a student already, the network carries other LoRAs, or the student is of another one.
        """
        if self.gap_embedder is not None:
            raise ValueError("gap_embedder: the pipeline has a student; load another into a fresh pipeline")
        network: Any = unwrap(self.network)
        adapters = sorted(getattr(network, "peft_config", {}))
        if adapters:
            raise ValueError(f"{type(network).__name__} carries the LoRAs {adapters}; fuse or unload them first")
        flow_map = load_flow_map(self, folder_or_repo_id)
        if getattr(network, "peft_config", None):
            fuse_lora(network)
        self._flow_map = flow_map
        self.register_modules(gap_embedder=flow_map.network.gap_embedder)
        if not hasattr(self.scheduler, "jump_target"):
            self.register_modules(scheduler=FlowMapScheduler.from_scheduler(self.scheduler))

    @property
    def scalars(self) -> Mapping[str, float]:
        """Numbers that the student can be told (``guidance_scale`` ...), with what it is told by default."""
        part = self._network_config if self.gap_embedder is None else self.gap_embedder.config
        return part.get("scalars") or {}

    @property
    def embeds_guidance(self) -> bool:
        return "guidance_scale" in self.scalars or super().embeds_guidance

    def _choose_guider(self, guider, guidance_scale, arguments):
        if guidance_scale is not None and not self.embeds_guidance:
            raise ValueError(
                f"guidance_scale={guidance_scale}: the student is not told one, what guidance it has is trained in; "
                "train it with a range of objective.guidance_scale to choose one here"
            )
        return super()._choose_guider(guider, guidance_scale, arguments)

    def encode(self, prompt=None, *, class_labels=None, height=None, width=None, **arguments) -> Condition:
        """As :meth:`genkit.pipelines.base.DenoiserPipeline.encode`; beside it the student's scalars, one or one each.

        Raises:
            ValueError: a guidance scale that is not positive, another scalar that is not finite, or too few or many.
        """
        told = {name: arguments.pop(name, None) for name in self.scalars}
        given = {name: value for name, value in told.items() if value is not None}
        condition = super().encode(prompt, class_labels=class_labels, height=height, width=width, **arguments)
        n = len(condition) or max((len(v) for v in given.values() if isinstance(v, (Sequence, Tensor))), default=1)
        values = {}
        for name, value in given.items():
            numbers = torch.as_tensor(value, dtype=torch.float32, device=self._execution_device).reshape(-1)
            if len(numbers) not in (1, n):
                raise ValueError(f"{name} has {len(numbers)} values for {n} images; give one, or one an image")
            if not numbers.isfinite().all() or name == "guidance_scale" and not (numbers > 0).all():
                raise ValueError(
                    f"{name}={value}: accepted are {'positive' if 'guidance' in name else 'finite'} numbers"
                )
            values[name] = numbers.expand(n).contiguous()
        return condition.with_values(values) if values else condition

    def denoiser(self) -> FlowMap:
        """The flow map.

        Raises:
            ValueError: there is none, or it does not fit the scheduler.
        """
        denoiser = from_pipeline(self)
        if self.gap_embedder is None:
            if isinstance(denoiser, FlowMap):
                return denoiser
            raise ValueError(
                f"gap_embedder=None: {type(unwrap(self.network)).__name__} knows one time; give the pipeline a student "
                "by load_flow_map"
            )
        # Kept from call to call, since it hooks itself to the network for good.
        held = self._flow_map
        same = held is not None and (
            held.denoiser.network is denoiser.network
            and held.network.gap_embedder is self.gap_embedder
            and type(held.interpolant) is type(denoiser.interpolant)
            and held.denoiser.prediction_type == denoiser.prediction_type
        )
        if not same:
            held = TwoTime(denoiser, self.gap_embedder)  # type: ignore[arg-type]
        assert held is not None
        self._flow_map, held.calls = held, 0
        return held

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 4,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> PipelineOutput | tuple:
        """Generate images.

        Args:
            prompt, class_labels: what the network is told, by which of the two it takes; neither for an unconditional
                network, which is given ``batch_size``.
            num_inference_steps: jumps, of one network call each.
            arguments: those of :class:`genkit.pipelines.text_to_image.TextToImagePipeline`, guiders excepted, and the
                student's :attr:`scalars`. ``guidance_scale`` is for students that were trained with a range of it and
                for networks that embed it (FLUX.1-dev); others have theirs trained in.

        Raises:
            ValueError: no student, arguments that the network does not take or that do not fit each other; before the
                network is first called.
        """
        if prompt is None and class_labels is None and arguments.get("batch_size"):
            # A condition that brings scalars alone must have as many as there are images.
            numbers = {k: v for k, v in arguments.items() if k in self.scalars and isinstance(v, (int, float))}
            arguments |= {name: [value] * arguments["batch_size"] for name, value in numbers.items()}
        run = self._generate(
            num_inference_steps, prompt=prompt, class_labels=class_labels, output_type=output_type, **arguments
        )
        output = self._finish(run, output_type)
        return output if return_dict else (output.images, output.network_calls)
