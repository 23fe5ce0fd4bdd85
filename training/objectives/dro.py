"""Direct reward optimisation: fit what a test accepted, unfit what it rejected; no pairs are needed."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from genkit.rng import ItemRNG
from genkit.training.objectives._preference import MaxRise, PreferenceConfig, PreferenceObjective, pair_signs, twice
from genkit.training.objectives.base import Batch, Loss, ObjectiveConfig, Phase
from genkit.training.parts.preferences import clipped, group_weights, saturating


class _Repelling(ObjectiveConfig):
    negative_weight: float = Field(1.0, gt=0, le=1)
    max_rise: float | None = MaxRise


class Clip(_Repelling):
    """``w+ err - w- min(err, kappa err_ref)``: rejected samples count until their error is ``kappa`` times as large."""

    kind: Literal["clip"] = "clip"
    kappa: float = Field(2.0, gt=1)


class Softplus(_Repelling):
    """``w+ softplus(beta (err - err_ref)) + w- softplus(-beta (err - err_ref))``."""

    kind: Literal["softplus"] = "softplus"
    beta: float = Field(500.0, gt=0)


class Plain(_Repelling):
    """``w err``, as published: unbounded below. With ``max_rise: null`` it has no reference, and spares its calls."""

    kind: Literal["plain"] = "plain"


class SFT(ObjectiveConfig):
    """``w+ err``: supervised fine-tuning on what was accepted, the baseline."""

    kind: Literal["sft"] = "sft"


class Scores(ObjectiveConfig):
    """A score a sample, the field ``score`` in [0, 1] of the data (``data.name=feedback``).

    Accepted and rejected samples weigh the same in sum: an item's weight is divided by its group's share of the data,
    the field ``share``, though it is multiplied by no more than ``max_weight``; at 1 all weigh the same.
    """

    kind: Literal["scores"] = "scores"
    max_weight: float = Field(10.0, ge=1)


class Pairs(ObjectiveConfig):
    """An accepted and a rejected sample an item, the latter in the field ``lose`` (``data.name=preferences``)."""

    kind: Literal["pairs"] = "pairs"


class DROConfig(PreferenceConfig):
    """Settings of :class:`DRO`, beside those of every method on preferences.

    ``form``: ``{kind: clip, softplus, plain or sft, ...}``; forms that repel have ``negative_weight``, what rejected
    samples weigh against accepted ones, and ``max_rise``. ``feedback``: ``{kind: scores or pairs, ...}``.
    """

    form: Annotated[Clip | Softplus | Plain | SFT, Field(discriminator="kind")] = Clip()
    feedback: Annotated[Scores | Pairs, Field(discriminator="kind")] = Scores()


class DRO(PreferenceObjective):
    """``E[w err]`` with ``w = (2 o - 1) / share`` and ``err = |target - prediction|^2 / D``, a scalar; bounded forms.

    ``x_t = alpha(t) x0 + sigma(t) eps``; ``o`` in [0, 1] is the verdict on a sample: accepted 1, rejected 0, or between
    them. With pairs ``E[err_w - err_l]``, one ``t`` a pair and a noise a sample. At ``student = reference`` that is the
    direction of Diffusion-DPO, whose gradient is ``beta / 4`` times as long. The published form has no lower bound:
    rejected samples can be made worse forever. ``err_w`` and ``err_l`` are logged apart; should the first rise, it is
    time to stop.

    Groups are normalised by their shares of the *data set*, which the source knows, and not by their numbers in a
    micro-batch: an item's weight is its own, the sum over a batch does not depend on how it is cut, a batch of rejected
    samples alone is one of small weight where these are many, and the expectation is the mean over the accepted less
    ``negative_weight`` times that over the rejected.

    The reference, where the form has one, is the teacher if the run has one, else the student as it was at the start: a
    frozen copy, or under LoRA the network without its adapter.

    Raises:
        ValueError: data without scores (rejected samples, with pairs), scores outside of [0, 1], or without shares.
        DivergedError: accepted samples get worse by more than ``max_rise``.

    Source: Li et al., "DSO: aligning 3D generators with simulation feedback for physical soundness", arXiv 2503.22677;
    the forms ``clip`` and ``softplus``, scalar scores and shares are ours.
    """

    Config: ClassVar[type[DROConfig]] = DROConfig

    @property
    def needs_reference(self) -> bool:
        form = self.config.form
        return form.kind in ("clip", "softplus") or form.kind == "plain" and form.max_rise is not None

    def losses(self, phase: Phase, batch: Batch, rng: ItemRNG) -> Iterator[Loss]:
        c, form = self.config, self.config.form
        self.eval()  # no dropout: student and reference must differ in their weights alone
        x0, condition, t = batch.x0, batch.condition, self.times.draw(rng)
        eps = rng.normal(x0.shape[1:], dtype=x0.dtype)
        if c.feedback.kind == "pairs":
            x0, condition, t = torch.cat((x0, self.rejected(batch))), twice(condition), t.repeat(2)
            eps = torch.cat((eps, rng.normal(eps.shape[1:], dtype=eps.dtype)))
            weight = pair_signs(t)
        else:
            weight = self.weights(batch)
        err, before = self.errors(x0, eps, t, condition)
        logs = self.watch.add(weight, err.detach(), before)
        if before is not None:
            right = -weight.sign() * (err.detach() - before).sign()
            logs["implicit_accuracy"] = (right.mean() + 1) / 2
        if form.kind != "sft":
            self.watch.check(form.max_rise)
        yield Loss(self.terms(weight.to(err), err, before).sum() / len(batch.x0), logs)

    def terms(self, weight: Tensor, err: Tensor, before: Tensor | None) -> Tensor:
        """What each sample adds, ``(B,)``, for signed weights ``(B,)``."""
        form = self.config.form
        if form.kind == "sft":
            return weight.clamp(min=0) * err
        weight = torch.where(weight < 0, form.negative_weight * weight, weight)
        if form.kind == "plain":
            return weight * err
        assert before is not None
        if form.kind == "clip":
            return clipped(weight, err, before, form.kappa)
        return saturating(weight, err, before, form.beta)

    def weights(self, batch: Batch) -> Tensor:
        """Signed weights of the items, ``(B,)``, by their scores and shares."""
        score, share = (batch.fields.get(name) for name in ("score", "share"))
        max_weight = self.config.feedback.max_weight
        if score is None:
            raise ValueError(
                f"data gives {sorted(batch.fields)}, not the field 'score' with a number in [0, 1] a sample; set "
                "data.name=feedback"
            )
        if bool(((score < 0) | (score > 1)).any()):
            raise ValueError(
                f"score={score.tolist()}: accepted is 0 (rejected) to 1 (accepted); set data.name=feedback"
            )
        if max_weight == 1:
            share = None
        elif share is None:
            raise ValueError(
                f"objective.feedback.max_weight={max_weight:g} balances accepted and rejected samples by the field "
                "'share', which the data does not give; set data.name=feedback, or max_weight=1 to do without"
            )
        return group_weights(score.double(), share, max_weight).to(torch.promote_types(batch.x0.dtype, torch.float32))
