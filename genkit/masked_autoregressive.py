"""What training and pipelines need of a masked autoregressive network: its tokens, and samples in a few large steps."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genkit.checks import check_integer, check_number
from genkit.denoisers.base import Condition
from genkit.gaussian_chain import TRAIN_STEPS, GaussianChain
from genkit.networks.mar import MAR
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer
from genkit.students import Student


def reveal_counts(length: int, num_ar_steps: int) -> list[int]:
    """How many of ``length`` tokens each step draws: after step ``k``, ``floor(L cos(pi/2 (k + 1) / K))`` are left.

    At least one is drawn at each step, and all are at the last.

    Raises:
        ValueError: no steps, or more than tokens.
    """
    if not 1 <= num_ar_steps <= length:
        raise ValueError(f"num_ar_steps={num_ar_steps}: accepted are 1 to {length}, the number of tokens")
    left, counts = length, []
    for k in range(1, num_ar_steps + 1):
        after = max(1, min(left - 1, math.floor(length * math.cos(math.pi / 2 * k / num_ar_steps))))
        counts.append(left - (after if k < num_ar_steps else 0))
        left -= counts[-1]
    return counts


@dataclass(frozen=True)
class MARSampling:
    """How samples are drawn.

    Args:
        num_inference_steps: of the head for every token: one number, or fewer and fewer.
        num_ar_steps: of the transformer; by default one a token, 64 at most.
        guidance_scale: of classifier-free guidance on the head's noise; 1 is none and costs no second branch.
        guidance_schedule: ``constant``, or ``linear``: ``1 + (w - 1) s`` with ``s`` the share of tokens that are known
            after the step.
        temperature: of the head's noise.
        max_timestep: see :class:`genkit.gaussian_chain.GaussianChain`. Masked autoregression was published with 999:
            from there the first steps divide what the head gets wrong by next to nothing, and samples of a network that
            has not learned for long explode.

    Raises:
        ValueError: a setting out of range.
    """

    num_inference_steps: int | StepAnnealer = 100
    num_ar_steps: int | None = None
    guidance_scale: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0
    max_timestep: int = 950

    def __post_init__(self):
        check_number("guidance_scale", self.guidance_scale)
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be a number of at least 0")
        if self.guidance_schedule not in ("linear", "constant"):
            raise ValueError(f"guidance_schedule={self.guidance_schedule!r}: accepted are linear, constant")
        check_number("temperature", self.temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be a number of at least 0")
        if self.num_ar_steps is not None:
            check_integer("num_ar_steps", self.num_ar_steps)
        most = self.num_inference_steps
        if not isinstance(most, StepAnnealer):
            check_integer("num_inference_steps", most)
        check_integer("max_timestep", self.max_timestep)
        count = most.hi if isinstance(most, StepAnnealer) else most
        if count is not None and not 1 <= count <= TRAIN_STEPS:  # None where a budget decides it
            raise ValueError(f"num_inference_steps={most}: accepted are 1 to {TRAIN_STEPS} steps of the head")
        GaussianChain(1, self.max_timestep)  # refuses a timestep out of range

    def head_steps(self, num_ar_steps: int) -> list[int]:
        """Steps of the head at each of ``num_ar_steps`` of the transformer.

        Raises:
            ValueError: a budget that is too small for them, or more than the head can spend.
        """
        steps = self.num_inference_steps
        annealer = steps if isinstance(steps, StepAnnealer) else StepAnnealer(steps, kind="constant")
        found = [annealer(k, num_ar_steps) for k in range(num_ar_steps)]
        if found[0] > TRAIN_STEPS:
            raise ValueError(
                f"num_inference_steps={steps}: the first of {num_ar_steps} autoregressive steps would take {found[0]}; "
                f"accepted are 1 to {TRAIN_STEPS} steps of the head"
            )
        return found

    def guidance(self, known: float) -> float:
        """The scale at a step after which a share ``known`` of the tokens is known."""
        return 1 + (self.guidance_scale - 1) * (known if self.guidance_schedule == "linear" else 1)


class MaskedAutoregressive(Student):
    """Sets of tokens in a random order, each drawn by a diffusion head given all tokens before its set.

    A token is a patch of the sample: ``D = C p^2`` numbers, channel first; patches are numbered row by row.

    Attributes:
        head_calls: calls of the head one after the other so far; both branches of guidance are one.
        head_evaluations: tokens of a sample that went through the head so far, both branches counted.

    Source: Li et al., "Autoregressive image generation without vector quantization", arXiv 2406.11838; steps of the
    head: Zhao et al., "DiSA", arXiv 2505.20297.
    """

    network: MAR
    head_calls: int
    takes_steps = True

    def __init__(self, network: MAR):
        super().__init__(network)
        config = network.config
        self.shape, self.num_classes = (config.in_channels, config.sample_size, config.sample_size), config.num_classes
        self.length, self.channels = (config.sample_size // config.patch_size) ** 2, network.embed.in_features
        self.head_calls = self.head_evaluations = 0

    def tokens(self, x: Tensor) -> Tensor:
        """Patches ``(B, L, D)`` of samples ``(B, C, H, W)``."""
        b, c, side, _ = x.shape
        p = self.network.config.patch_size
        n = side // p
        return x.reshape(b, c, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, c * p * p)

    def samples(self, tokens: Tensor) -> Tensor:
        """Samples ``(B, C, H, W)`` of patches ``(B, L, D)``."""
        (c, side, _), p = self.shape, self.network.config.patch_size
        n = side // p
        return tokens.reshape(-1, n, n, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, *self.shape)

    def check(self, settings: MARSampling) -> None:
        self._plan(settings)

    def cost(self, settings: MARSampling) -> float:
        counts, steps = self._plan(settings)
        return (len(counts) + sum(steps)) * super().cost(settings)

    def _plan(self, settings: MARSampling) -> tuple[list[int], list[int]]:
        """How many tokens each step draws, and by how many steps of the head."""
        num_ar_steps = min(64, self.length) if settings.num_ar_steps is None else settings.num_ar_steps
        return reveal_counts(self.length, num_ar_steps), settings.head_steps(num_ar_steps)

    def draw(self, rng: ItemRNG, condition: Condition, num_inference_steps: int | StepAnnealer | None = None) -> Tensor:
        settings = MARSampling() if num_inference_steps is None else MARSampling(num_inference_steps)
        return self.sample(rng, condition, settings).float()

    @torch.no_grad()
    def sample(self, rng: ItemRNG, condition: Condition, settings: MARSampling) -> Tensor:
        """Samples ``(B, *shape)``, one a row of ``rng``, which is all their randomness; in float32 at least.

        Raises:
            ValueError: more steps than tokens, a budget that is too small or too large for them.
        """
        network, b = self.network, len(rng)
        counts, steps = self._plan(settings)
        chains = {t: GaussianChain(t, settings.max_timestep) for t in set(steps)}
        guided = settings.guidance_scale != 1
        labels = condition["class_labels"]
        if guided:
            labels = torch.cat((labels, condition.null()["class_labels"]))
        dtype = torch.promote_types(network.embed.weight.dtype, torch.float32)
        order = rng.uniform((self.length,), dtype=torch.float64).argsort(1)
        tokens = torch.zeros(b, self.length, self.channels, dtype=dtype, device=order.device)
        training, known = network.training, 0
        network.eval()
        try:
            for count, num_steps in zip(counts, steps, strict=True):
                visible, chosen = order[:, :known], order[:, known : known + count]
                known += count
                both = [torch.cat((v, v)) if guided else v for v in (tokens, visible, chosen)]
                z = self.outputs(both[0], both[1], both[2], labels)
                self.calls += guided  # the second branch, of the same batch
                head = self._head(z.unflatten(0, (-1, b)), settings.guidance(known / self.length))
                shape = (count, self.channels)
                new = chains[num_steps].sample(head, rng, shape, dtype=dtype, temperature=settings.temperature)
                tokens = tokens.scatter(1, chosen[..., None].expand(-1, -1, self.channels), new)
        finally:
            network.train(training)
        return self.samples(tokens)

    def outputs(self, tokens: Tensor, visible: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
        """``z`` ``(B, m, E)`` of the tokens at ``chosen`` ``(B, m)``, given those at ``visible`` ``(B, n)``."""
        self.calls += 1
        z = self.network(tokens, visible, labels)
        return z.gather(1, chosen[..., None].expand(-1, -1, z.shape[2]))

    def _head(self, z: Tensor, scale: float):
        """The head under ``z`` ``(1 or 2, B, m, E)``; the second branch, without class, sees the same noise."""

        def head(x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
            self.head_calls += 1
            self.head_evaluations += z.shape[0] * z.shape[2]
            t = torch.tensor(timestep, device=x.device)
            epsilon, logits = self.network.head(x.expand(len(z), *x.shape), t, z)
            return epsilon[-1] + scale * (epsilon[0] - epsilon[-1]), logits[0]

        return head
