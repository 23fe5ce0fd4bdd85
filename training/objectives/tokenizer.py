"""Training of an image tokenizer: reconstruction, a perceptual distance, a discriminator."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from genkit.adapters import fused
from genkit.networks.dino_discriminator import DinoDiscriminator
from genkit.networks.patch_discriminator import Norm, PatchDiscriminator
from genkit.networks.tokenizer import Reconstruction
from genkit.perceptual.laplacian import LaplacianPyramid
from genkit.perceptual.lpips import LPIPS, Net
from genkit.pipelines.tokenizer import TokenizerPipeline
from genkit.quantizers.usage import CodeUsage
from genkit.quantizers.vq import VQ
from genkit.rng import ItemRNG
from genkit.tokenizers import Tokenizer
from genkit.training.objectives.base import Batch, Loss, Objective, ObjectiveConfig, Phase, Role
from genkit.training.parts.differentiable_augmentation import Augmentation, augment
from genkit.training.parts.gan import GANLoss, LastLayer, LeCam, adaptive_weight, discriminator_loss, generator_loss


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lpips(_Part):
    """LPIPS: ``net``, and ``backbone``, its weights as :meth:`genkit.perceptual.LPIPS.load` takes them."""

    kind: Literal["lpips"] = "lpips"
    weight: float = Field(1.0, gt=0)
    net: Net = "vgg"
    backbone: str


class Laplacian(_Part):
    """:class:`genkit.perceptual.laplacian.LaplacianPyramid`, which needs no weights."""

    kind: Literal["laplacian"] = "laplacian"
    weight: float = Field(1.0, gt=0)
    levels: int | None = Field(None, ge=1)


class Patch(_Part):
    """Settings of :class:`genkit.networks.patch_discriminator.PatchDiscriminator`."""

    kind: Literal["patch"] = "patch"
    num_filters: int = Field(64, ge=1)
    num_layers: int = Field(3, ge=0)
    norm: Norm = "batch"


class Dino(_Part):
    """Settings of :class:`genkit.networks.dino_discriminator.DinoDiscriminator` on ``model``, a folder or a name on the
    Hub."""

    kind: Literal["dino"] = "dino"
    model: str
    layers: list[int] | None = Field(None, min_length=1)
    size: int | None = Field(None, ge=1)
    hidden_size: int = Field(256, ge=1)
    num_layers: int = Field(2, ge=1)
    norm_num_groups: int = Field(32, ge=1)


class Adversarial(_Part):
    """The discriminator and the ``weight`` of its opinion, from optimiser step ``start`` on.

    ``adaptive``: times the ratio of the gradients of reconstruction and opinion at the last layer, in each micro-batch.
    ``lecam_weight``, ``lecam_decay``: of :class:`genkit.training.parts.gan.LeCam` within the discriminator's loss.
    ``augment``: what pictures go through before they are judged. ``optimizer``: settings in place of the run's.
    """

    weight: float = Field(0.5, gt=0)
    start: int = Field(0, ge=0)
    loss: GANLoss = "hinge"
    adaptive: bool = False
    lecam_weight: float = Field(0.0, ge=0)
    lecam_decay: float = Field(0.999, ge=0, lt=1)
    discriminator: Annotated[Patch | Dino, Field(discriminator="kind")] = Patch()
    augment: list[Augmentation] = []
    optimizer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _decay_is_read(self):
        if "lecam_decay" in self.model_fields_set and not self.lecam_weight:
            raise ValueError("lecam_decay has no effect with lecam_weight=0")
        return self


Perceptual: TypeAlias = Annotated[Lpips | Laplacian, Field(discriminator="kind")]


class VQGANConfig(ObjectiveConfig):
    """Settings of :class:`VQGAN`; ``perceptual`` and ``adversarial`` may be left out. Weights of the quantizer's losses
    are settings of the quantizer."""

    pixel_loss: Literal["l2", "l1"] = "l2"
    pixel_weight: float = Field(1.0, gt=0)
    perceptual: Perceptual | None = None
    adversarial: Adversarial | None = None


class VQGAN(Objective):
    """A tokenizer learns ``x^``, what it makes of pictures ``x`` in [-1, 1]::

        L = w_rec l(x, x^) + w_p P(x, x^) + lambda w_d(k) G(D(x^)) + losses of the quantizer
        L_D = w_d(k) (H(D(x), D(sg x^)) + w_lecam LeCam)

    ``l`` the mean squared or absolute difference, ``P`` a perceptual distance of pictures in [0, 1], ``w_d(k)`` the
    weight from step ``start`` on and 0 before, when the discriminator ``D`` is not called at all. It judges the very
    ``x^`` of the generator's update, real and generated ones apart. ``lambda`` is 1 unless ``adaptive``. The quantizer
    is told of the run's progress. Logged ``usage`` and ``perplexity`` are of a micro-batch; those beside samples, of
    the samples, with the usage that uniform codes would have.

    What is exported is baked: its quantizer keeps the codes alone.

    Sources: Esser et al., "Taming transformers for high-resolution image synthesis", arXiv 2012.09841; Sun et al.,
    "Autoregressive model beats diffusion: Llama for scalable image generation", arXiv 2406.06525, section 3.1.

    Raises:
        ValueError: pictures too small for the discriminator; other channels in than out; under a LoRA, codes that move
            by themselves.
    """

    Config = VQGANConfig
    student_type = Tokenizer
    needs_condition = False
    shards = False  # the table of codes is read row by row

    student: Tokenizer  # type: ignore[assignment]

    def __init__(
        self,
        config: VQGANConfig,
        student: Tokenizer,
        teacher: None = None,
        *,
        perceptual: nn.Module | None = None,
        discriminator: PatchDiscriminator | DinoDiscriminator | None = None,
    ):
        super().__init__(config, student, teacher)  # type: ignore[arg-type]
        self.perceptual, self.discriminator = perceptual, discriminator
        a = config.adversarial
        self.lecam = LeCam(a.lecam_decay) if a is not None and a.lecam_weight else None
        self._made: deque[Tensor] = deque()  # of the micro-batches under way, from generator to discriminator
        self._measured: dict[str, float] = {}
        if discriminator is not None and min(student.shape[1:]) < discriminator.smallest:
            raise ValueError(
                f"sample_size={student.shape[1]}: objective.adversarial.discriminator takes pictures of "
                f"{discriminator.smallest} pixels at least; fewer num_layers take smaller ones"
            )
        shapes = student.network.config
        if shapes["in_channels"] != shapes["out_channels"]:
            raise ValueError(
                f"model.in_channels={shapes['in_channels']}, model.out_channels={shapes['out_channels']}: must agree, "
                "since pictures are compared with what is made of them"
            )
        if all(p.requires_grad for p in student.module.parameters()):
            return
        for part in student.network.quantizer.modules():  # checkpoints hold no buffers of a network with an adapter
            if isinstance(part, VQ) and (
                part.config.rule == "ema" or part.config.kmeans_init or part.config.restart_threshold
            ):
                raise ValueError(
                    "adapter.kind=lora or sara: codes that move by themselves (rule='ema', kmeans_init, "
                    "restart_threshold) need adapter.kind=full"
                )

    @classmethod
    def make(cls, config: VQGANConfig, student: Tokenizer, teacher: None, pipe: Any) -> "VQGAN":  # type: ignore[override]
        parts: dict[str, Any] = {}
        p, a = config.perceptual, config.adversarial
        if p is not None:
            parts["perceptual"] = LPIPS.load(p.net, p.backbone) if isinstance(p, Lpips) else LaplacianPyramid(p.levels)
        if a is not None:
            settings = a.discriminator.model_dump(exclude={"kind"})
            if isinstance(a.discriminator, Dino):
                parts["discriminator"] = DinoDiscriminator.load(**settings)
            else:
                parts["discriminator"] = PatchDiscriminator(student.shape[0], **settings)
        return cls(config, student, teacher, **parts)

    # -- what the trainer asks ------------------------------------------------------------------------------------

    @property
    def roles(self) -> Mapping[str, Role]:
        roles = {"student": Role(self.student_module, ema=True)}
        if self.discriminator is not None:
            roles["discriminator"] = Role(self.discriminator, optimizer=self.config.adversarial.optimizer)
        if self.perceptual is not None:
            roles["perceptual"] = Role(self.perceptual, trains=False)
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        generator = Phase("generator", trains=("student",))
        if not self.adversarial_weight(step):
            return (generator,)
        return (generator, Phase("discriminator", trains=("discriminator",)))

    def adversarial_weight(self, step: int) -> float:
        """``w_d``: 0 before ``start``, and without a discriminator."""
        a = self.config.adversarial
        return a.weight if a is not None and step >= a.start else 0.0

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        yield self._discriminator_loss(batch, rng) if phase.name == "discriminator" else self._loss(batch, rng)

    def restored(self, fields: Mapping[str, Tensor]) -> Tensor:
        usage = CodeUsage(self.student.network.quantizer.codebook_size)
        x, parts = fields["x0"], []
        with torch.no_grad():
            for some in x.split(64):
                made = self.student(some)
                usage.update(made.quantized.indices)
                parts.append(made.sample)
        out = torch.cat(parts)
        self._measured = {
            "usage": usage.usage,
            "expected_usage": usage.expected,
            "perplexity": usage.perplexity,
            "mse": F.mse_loss(out, x).item(),
        }
        return out

    def measures(self, pixels: Tensor, prompts: Any) -> dict[str, float]:
        return self._measured

    def pipeline(self, pipe: Any) -> TokenizerPipeline:
        network: Any = fused(self.student_module)
        return TokenizerPipeline(network.bake())

    # -- losses ---------------------------------------------------------------------------------------------------

    def _loss(self, batch: Batch, rng: ItemRNG) -> Loss:
        c, x = self.config, batch.x0
        weight: Any = self.adversarial_weight(batch.step)
        self.student.network.quantizer.progress = batch.progress
        made, last = self._reconstructed(x)
        difference = made.sample - x
        pixel = difference.square().mean() if c.pixel_loss == "l2" else difference.abs().mean()
        total, logs = c.pixel_weight * pixel, {"reconstruction": pixel.detach()}
        if self.perceptual is not None:
            distance = self.perceptual((made.sample + 1) / 2, (x + 1) / 2).mean()
            total, logs["perceptual"] = total + c.perceptual.weight * distance, distance.detach()
        if weight:
            assert self.discriminator is not None
            self._made.append(made.sample.detach())
            a = c.adversarial
            opinion = generator_loss(self._judged(made.sample, rng), a.loss)
            logs["adversarial"] = opinion.detach()
            if a.adaptive:
                balance = adaptive_weight(last.gradient(total), last.gradient(opinion))
                weight, logs["adaptive_weight"] = weight * balance, balance
            total = total + weight * opinion
        for name, loss in made.quantized.losses.items():
            total, logs[name] = total + loss, loss.detach()
        return Loss(total, logs | made.quantized.stats)

    def _discriminator_loss(self, batch: Batch, rng: ItemRNG) -> Loss:
        a = self.config.adversarial
        real, fake = self._judged(batch.x0, rng), self._judged(self._made.popleft(), rng)
        logs = {"logits_real": real.mean().detach(), "logits_fake": fake.mean().detach()}
        loss = discriminator_loss(real, fake, a.loss)
        if self.lecam is not None:
            penalty = self.lecam(real, fake)
            loss, logs["lecam"] = loss + a.lecam_weight * penalty, penalty.detach()
        return Loss(self.adversarial_weight(batch.step) * loss, logs)

    def _judged(self, pictures: Tensor, rng: ItemRNG) -> Tensor:
        assert self.discriminator is not None
        return self.discriminator(augment(pictures, rng, self.config.adversarial.augment))

    def _reconstructed(self, x: Tensor) -> tuple[Reconstruction, LastLayer]:
        layer = self.student.network.decoder.conv_out
        seen: list[LastLayer] = []
        handle = layer.register_forward_hook(lambda _, inputs, out: seen.append(LastLayer(layer, inputs[0], out)))
        try:
            return self.student(x), seen[0]
        finally:
            handle.remove()
