"""What rewards say of latents, and in which direction these would please them more."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from genkit import rewards
from genkit.latents import decoded
from genkit.registry import lookup
from genkit.rewards.base import Prompts, Reward
from genkit.rewards.weighted_sum import RewardSum
from genkit.training.parts.leaps import connect
from genkit.training.parts.reward_loss import RewardLoss
from genkit.training.parts.trends import Trends
from genkit.training.validation import validate

Clamp = Literal["straight_through", "hard"]


class Component(BaseModel):
    """A reward: ``name`` of a file in ``genkit.rewards``, whose own settings stand beside; ``weight`` in the sum of
    ``(r - mean) / std``; ``label`` in the logs, by default the name.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: float = 1.0
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    label: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value):
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self):
        reward = lookup("genkit.rewards", Reward, self.name, setting="name")
        validate(reward.Config, self.model_extra or {}, f"reward {self.name}")
        return self

    @property
    def key(self) -> str:
        return self.label or self.name

    def make(self) -> Reward:
        return rewards.make(self.name, **(self.model_extra or {}))


class Judged(NamedTuple):
    """Of every row of a batch ``loss`` ``(B,)`` and its ``gradient`` with respect to the latents, both 0 where the
    reward is not finite; ``logs``: means of what was seen.
    """

    loss: Tensor
    gradient: Tensor
    logs: dict[str, Tensor]


class Judge(nn.Module):
    """Rewards of decoded latents, with a gradient that holds no graph but their own.

    Args:
        trained: what ``loss`` is of, a sum.
        held_out: what is only watched.
        normalise: whether the sum's terms are standardised by constants or by their running statistics.
        vae: autoencoder; ``None`` for samples that are pictures on [-1, 1] themselves.
        clamp: of pictures to [0, 1]: with the gradient of what is cut, or without.
        micro_batch: rows that are decoded and judged at a time; ``None`` is all.
        window: steps that :class:`genkit.training.parts.trends.Trends` looks back.

    Raises:
        ValueError: a trained reward that is not differentiable.
    """

    def __init__(
        self,
        trained: Sequence[Component],
        held_out: Sequence[Component],
        loss: RewardLoss,
        *,
        normalise: Literal["constants", "running"] = "constants",
        vae: Any = None,
        clamp: Clamp = "straight_through",
        micro_batch: int | None = None,
        window: int = 50,
    ):
        super().__init__()
        made = {c.key: c.make() for c in trained}
        deaf = [key for key, reward in made.items() if not reward.differentiable]
        if deaf:
            raise ValueError(
                f"objective.rewards: {deaf} have no gradient, which this method needs; accepted are differentiable "
                "ones. Others can be held_out, or score the samples that objective=dro and diffusion_dpo learn from"
            )
        scales = {c.key: (c.mean, c.std) for c in trained}
        self.reward = RewardSum(
            made, {c.key: c.weight for c in trained}, "running" if normalise == "running" else scales
        )
        self.held_out = nn.ModuleDict({c.key: c.make() for c in held_out})
        self.loss, self.vae, self.clamp, self.micro_batch = loss, vae, clamp, micro_batch
        self.trends = Trends(list(self.held_out), window)

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Refuse pictures ``(C, H, W)`` that a reward cannot take."""
        self.reward.check_size(shape)
        for reward in self.held_out.values():
            reward.check_size(shape)  # type: ignore[operator]

    def forward(self, latents: Tensor, prompts: Prompts | None, *, watch: bool = True) -> Judged:
        """What the rewards say of clean ``latents`` ``(B, ...)``.

        Args:
            watch: whether these are the step's samples: what held-out rewards and statistics are taken of.
        """
        parts = [
            self._judge(latents[rows], None if prompts is None else prompts[rows], watch)
            for rows in _slices(len(latents), self.micro_batch)
        ]
        seen = {key: torch.cat([part[2][key] for part in parts]) for key in parts[0][2]}
        kept, pictures = seen.pop("kept") > 0, seen.pop("pictures")
        seen = {key: value.double().where(kept, math.nan) for key, value in seen.items()}
        if watch:
            seen["diversity"] = diversity(pictures, prompts)
            self.reward.note({key: seen[key] for key in self.reward.components})
            self.trends.note(torch.stack([seen[key] for key in ("reward", *self.held_out)], 1))
        rewards_by_name = {*self.reward.components, *self.held_out}
        logs = {
            f"reward/{key}" if key in rewards_by_name else key: value.nanmean()
            for key, value in seen.items()
            if bool(value.isfinite().any())
        }
        logs["dropped"] = (~kept).double().sum()
        return Judged(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), logs)

    def updated(self) -> str | None:
        """End of a step; a warning, where there is one."""
        self.reward.update()
        return self.trends.update()

    @torch.no_grad()
    def measures(self, pictures: Tensor, prompts: Prompts | None) -> dict[str, float]:
        """Mean of every reward, and the diversity, of ``pictures`` ``(B, C, H, W)`` on [0, 1]."""
        measured: dict[str, float] = {}
        for key, reward in (*self.reward.components.items(), *self.held_out.items()):
            values = [
                reward(pictures[rows], None if prompts is None else prompts[rows])
                for rows in _slices(len(pictures), self.micro_batch)
            ]
            measured[f"reward/{key}"] = float(torch.cat(values).nanmean())
        spread = diversity(pictures, prompts)
        return measured | ({"diversity": float(spread.nanmean())} if bool(spread.isfinite().any()) else {})

    def _judge(self, latents: Tensor, prompts: Prompts | None, watch: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        finite = latents.detach().isfinite().flatten(1).all(1)
        z = latents.detach().where(like(finite, latents), 0.0).requires_grad_()
        with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            pictures = (decoded(self.vae, z) + 1) / 2
            cut = pictures.clamp(0, 1)
            pictures = cut if self.clamp == "hard" else connect(cut.detach(), pictures)
            total, components = self.reward(pictures, prompts)
            loss = self.loss(total)
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        # Rows are judged each by itself, so that one that is not finite spoils no other.
        kept = finite & total.detach().isfinite() & gradient.isfinite().flatten(1).all(1)
        seen = {"reward": total.detach(), "kept": kept, "pictures": cut.detach()}
        seen |= {key: r.detach() for key, r in components.items()}
        if self.loss.kind == "hinge":
            seen["hinge_active"] = (loss.detach() > 0).to(loss.dtype)
        if watch:
            with torch.no_grad():
                seen |= {key: reward(cut.detach(), prompts) for key, reward in self.held_out.items()}
        return loss.detach().where(kept, 0.0), gradient.where(like(kept, gradient), 0.0), seen


def diversity(pictures: Tensor, prompts: Prompts | None) -> Tensor:
    """The rms distance of each picture from the others of its prompt, ``(B,)``; NaN where there is no other."""
    flat = pictures.flatten(1).double()
    if prompts is None:
        same = flat.new_ones(len(flat), len(flat), dtype=torch.bool)
    elif isinstance(prompts, Tensor):
        same = prompts[:, None] == prompts
    else:
        same = torch.tensor([[p == q for q in prompts] for p in prompts])
    same = same.to(flat.device).fill_diagonal_(False)
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(flat.shape[1])
    return apart.where(same, math.nan).nanmean(1)


def like(mask: Tensor, x: Tensor) -> Tensor:
    """One number a sample, ``(B,)``, to go with ``x`` ``(B, ...)``."""
    return mask.view(-1, *(1,) * (x.ndim - 1))


def _slices(n: int, size: int | None) -> list[slice]:
    return [slice(start, start + (size or n)) for start in range(0, n, size or n)]
