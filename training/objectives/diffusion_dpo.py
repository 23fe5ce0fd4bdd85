"""Diffusion-DPO: of two samples of a prompt, the preferred one is to gain on the other against a reference."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from genkit.rng import ItemRNG
from genkit.training.objectives._preference import MaxRise, PreferenceConfig, PreferenceObjective, pair_signs, twice
from genkit.training.objectives.base import Batch, Loss, Phase
from genkit.training.parts.preferences import dpo_loss


class DiffusionDPOConfig(PreferenceConfig):
    """Settings of :class:`DiffusionDPO`, beside those of every method on preferences.

    ``beta``: how much a difference of errors counts; errors are means over elements. ``same_noise``: one noise for both
    samples of a pair, as the released code has it, instead of one each.
    """

    beta: float = Field(2000.0, gt=0)
    same_noise: bool = True
    max_rise: float | None = MaxRise


class DiffusionDPO(PreferenceObjective):
    """``-log sigmoid(-beta/2 [(err_w - err_w_ref) - (err_l - err_l_ref)])``, a scalar.

    ``err = |target - prediction|^2 / D`` at ``x_t = alpha(t) x0 + sigma(t) eps``, in ``error``; ``t`` is one for both
    samples of a pair, ``(t, eps)`` one for student and reference. Preferred samples are the batch's, rejected ones its
    field ``lose`` (``data.name=preferences``), in the network's space. The factor ``T w(t)`` of the paper is in
    ``beta``. At ``student = reference`` the loss is ``log 2`` and its gradient ``beta / 4`` times that of ``err_w -
    err_l``.

    The reference is the teacher if the run has one, else the student as it was at the start: a frozen copy, or under
    LoRA the network without its adapter.

    Raises:
        ValueError: data without rejected samples, or with some of another shape.
        DivergedError: preferred samples get worse by more than ``max_rise``.

    Source: Wallace et al., "Diffusion model alignment using direct preference optimization", arXiv 2311.12908,
    equation 14.
    """

    Config: ClassVar[type[DiffusionDPOConfig]] = DiffusionDPOConfig

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c = self.config
        # No dropout, neither here nor where checkpointed blocks are computed again in the backward.
        self.eval()
        pairs = torch.cat((batch.x0, self.rejected(batch)))
        t = self.times.draw(rng).repeat(2)
        eps = rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        other = eps if c.same_noise else rng.normal(batch.x0.shape[1:], dtype=batch.x0.dtype)
        err, before = self.errors(pairs, torch.cat((eps, other)), t, twice(batch.condition))
        assert before is not None
        logs = self.watch.add(pair_signs(err), err.detach(), before)
        self.watch.check(c.max_rise)
        rise_win, rise_lose = (err - before).chunk(2)
        # Ties, as all of them at the start, are half right.
        logs["implicit_accuracy"] = ((rise_lose - rise_win).detach().sign().mean() + 1) / 2
        yield Loss(dpo_loss(rise_win, rise_lose, c.beta).mean(), logs)
