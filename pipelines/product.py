"""Images that two models, or one model under two prompts, both find likely."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers import Denoiser, from_pipeline
from genkit.guidance.experts import Experts
from genkit.pipelines.base import DenoiserPipeline, with_parts
from genkit.pipelines.feynman_kac import FeynmanKacOutput, FeynmanKacPipeline, asked, method, noisy


class ProductPipeline(FeynmanKacPipeline):
    """Weighted particles of ``q_1(x)^{b_1} q_2(x)^{b_2}``, two densities of the same space and noise levels::

        pipe = ProductPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", network_2=fine_tuned)
        out = pipe("a lighthouse", num_particles=8)
        out = pipe("a lighthouse", second_prompt="fog")         # of one model, if there is no network_2

    Args:
        network_2: the second model's network, of any class that can take the first one's place and with the same
            prediction type; ``None`` for the first one again, which is then told something else.
        exponents: ``b_1, b_2``, with a positive sum.
        parts: see :class:`genkit.pipelines.base.DenoiserPipeline` and, for the scheduler, :class:`FeynmanKacPipeline`.
            There is no guider: the densities are those of the conditional models.
    """

    model_cpu_offload_seq = DenoiserPipeline.model_cpu_offload_seq.replace("->vae", "->network_2->vae")
    _optional_components = [*DenoiserPipeline._optional_components, "network_2"]

    @with_parts
    def __init__(self, *, network_2=None, exponents: Sequence[float] = (1.0, 1.0), **parts):
        if len(exponents) != 2:
            raise ValueError(f"exponents={exponents}: must be two numbers")
        Experts(exponents=dict(zip("ab", exponents, strict=True)))  # refuses what is no density
        parts["scheduler"] = noisy(parts["scheduler"], sum(exponents))
        super().__init__(**parts)
        self.register_modules(network_2=network_2)
        self.register_to_config(exponents=list(exponents))

    def denoiser(self) -> Denoiser:
        return self._on_path(self.network)

    def _on_path(self, network: Any) -> Denoiser:
        return from_pipeline(SimpleNamespace(components={"network": network}, scheduler=self.scheduler))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        *,
        class_labels: int | Sequence[int] | Tensor | None = None,
        second_prompt: str | Sequence[str] | None = None,
        second_class_labels: int | Sequence[int] | Tensor | None = None,
        **arguments: Any,
    ) -> FeynmanKacOutput | tuple:
        """Generate particles.

        Args:
            prompt, class_labels: what the models are told, by which of the two they take.
            second_prompt, second_class_labels: what the second one is told, if something else; as many.
            arguments: those of :class:`FeynmanKacPipeline`, guiders excepted.

        Raises:
            ValueError: nothing that tells the two densities apart, a guider, numbers of prompts that do not fit, a
                second network of another path; before either network is first called.
        """
        own_scale = not self.embeds_guidance and arguments.get("guidance_scale") is not None
        if own_scale or arguments.get("guider") is not None:
            raise ValueError("guider, guidance_scale: a product is of the conditional densities; leave them out")
        second = second_prompt if second_prompt is not None else second_class_labels
        if self.network_2 is None and second is None:
            raise ValueError(
                "network_2=None and neither second_prompt nor second_class_labels: the two densities are the same"
            )
        expert: list[Any] = [None if self.network_2 is None else self._on_path(self.network_2), None]
        if second is not None:
            groups = asked(prompt, class_labels, arguments)
            told = {**self.told(arguments), "class_labels": second_class_labels}
            if isinstance(second_prompt, str):
                second_prompt = [second_prompt] * groups
            condition = self.encode(second_prompt, **told)
            if len(condition) != groups:
                raise ValueError(f"{len(condition)} second prompts or labels for {groups} first ones")
            count = method(arguments.get("particles"), arguments.get("num_particles")).num_particles
            copies = count * arguments.get("num_images_per_prompt", 1)
            expert[1] = condition.repeat(copies).to(self._execution_device)
        first, other = self.config.exponents
        guider = Experts(exponents={"cond": first, "second": other}).using(experts={"second": tuple(expert)})
        return super().__call__(prompt, num_inference_steps, class_labels=class_labels, guider=guider, **arguments)
