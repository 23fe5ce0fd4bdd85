"""LeapAlign: the reward's gradient through a few leaps along a trajectory, begun at any of its steps."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from genkit.training.objectives._reward import RewardObjective, RewardObjectiveConfig
from genkit.training.objectives.base import Batch, Loss, Phase, shared
from genkit.training.parts.judge import like
from genkit.training.parts.leaps import PointLaw, UniformPoints, connect, discount, distance, similarity_weight
from genkit.training.parts.rollout import Rollout


class LeapAlignConfig(RewardObjectiveConfig):
    """``leaps``: how many, two as published; ``points``: the law of the calls at which they begin.

    ``pairs``: whether these are drawn for every sample, or once for the batch, on all processes.
    ``grad_discount``: ``alpha``, what is left of the gradient that passes the network's input from leap to leap.
    ``similarity_weight``: weigh samples by how close to the trajectory the leaps land, each at least ``tau`` away.
    ``form``: ``joint``, one graph of all leaps and no network calls beside the sampler's own; or ``sequential``, leap
    after leap from the last on: the same gradient, with one network call alive at a time and a call a leap more.
    """

    leaps: int = Field(2, ge=1, le=3)
    points: PointLaw = UniformPoints()
    pairs: Literal["sample", "batch"] = "batch"
    grad_discount: float = Field(0.3, ge=0, le=1)
    similarity_weight: bool = True
    tau: float = Field(0.1, gt=0)
    form: Literal["sequential", "joint"] = "sequential"

    @model_validator(mode="after")
    def _fits(self):
        self.points.check(self.num_inference_steps, self.leaps)
        if self.form == "joint" and self.pairs == "sample":
            raise ValueError("form='joint' has gradients on at the same calls for all samples: set pairs='batch'")
        if self.leaps == 1 and "grad_discount" in self.model_fields_set:
            raise ValueError(f"grad_discount={self.grad_discount}: one leap has no other to pass a gradient to")
        if not self.similarity_weight and "tau" in self.model_fields_set:
            raise ValueError(f"tau={self.tau} is without effect at similarity_weight=False")
        return self


class LeapAlign(RewardObjective):
    """``E w sum_m (g . d x_0 / d theta)`` along leaps ``k -> j -> 0`` that are pinned to the real trajectory.

    A leap keeps the prediction, on the linear path ``xhat_{j|k} = x_k - (k - j) v(x_k, k)``; in general it is one DDIM
    jump. Values are those of the trajectory, gradients those of the leaps::

        x_j~ = x_j + xhat_{j|k} - sg(xhat_{j|k})
        x_0~ = x_0 + xhat_{0|j} - sg(xhat_{0|j}),    xhat_{0|j} = x_j~ - j v(alpha x_j~ + (1 - alpha) sg(x_j~), j)
        w = 1 / (max(d_j, tau) + max(d_0, tau)),     d = mean |x - xhat|

    with ``g`` the gradient of the loss at the real image ``x_0``. ``alpha = 0`` has no product of Jacobians at all. The
    sequential form's memory does not depend on the number of steps or leaps.

    Source: LeapAlign, arXiv 2604.15311.
    """

    Config = LeapAlignConfig

    def phases(self, step):
        sequential = self.config.form == "sequential"
        return (Phase("student", trains=("student",), backwards=self.config.leaps if sequential else 1),)

    @property
    def recomputes(self) -> bool:  # type: ignore[override]
        return self.config.form == "joint"  # where one call is alive there is nothing to save

    def estimate(self, run, x, batch, rng):
        c = self.config
        points = c.points.draw(shared(batch, rng) if c.pairs == "batch" else rng, len(run), c.leaps).to(x.device)
        yield from (self._joint if c.form == "joint" else self._sequential)(run, x, points.expand(len(x), -1), batch)

    def _sequential(self, run: Rollout, x: Tensor, points: Tensor, batch: Batch) -> Iterator[Loss]:
        with torch.no_grad():
            states, raws = [torch.zeros_like(x)] * points.shape[1], [torch.zeros_like(x)] * points.shape[1]
            for i in range(len(run)):
                prediction = run.predict(x, i)
                for m in range(points.shape[1]):
                    here = like(points[:, m] == i, x)
                    states[m], raws[m] = x.where(here, states[m]), prediction.raw.to(x.dtype).where(here, raws[m])
                x = run.advance(prediction, i)
            landed = [
                run.step(run.at(raw, state, points[:, m]), points[:, m], self._end(run, points, m))
                for m, (state, raw) in enumerate(zip(states, raws, strict=True))
            ]
        loss, gradient, logs = self._weighed(x, [*states[1:], x], landed, batch)
        del x, prediction, raws, landed  # not to be held beside the network calls
        states = [state.where(like(state.isfinite().flatten(1).all(1), state), 0.0) for state in states]
        for m in reversed(range(points.shape[1])):
            passes = m > 0
            state = states[m].detach().requires_grad_(passes)
            # The network's input and the sample that the leap begins at are the same, but for their gradients.
            seen = states[m].detach().requires_grad_(passes and self.config.grad_discount > 0)
            leap = run.step(run.predict(seen, points[:, m]), points[:, m], self._end(run, points, m), x=state)
            made = self.surrogate(leap, gradient, loss, run, logs)
            # The trainer scales what it back-propagates (accumulation, float16); this tells by how much.
            scale = loss.new_zeros(()).requires_grad_(passes)
            yield Loss(made.value + scale, made.logs)
            if passes:
                assert state.grad is not None and scale.grad is not None  # the backward has been
                through = 0.0 if seen.grad is None else self.config.grad_discount * seen.grad
                gradient = (state.grad + through) / scale.grad
            loss, logs = torch.zeros_like(loss), {}

    def _joint(self, run: Rollout, x: Tensor, points: Tensor, batch: Batch) -> Iterator[Loss]:
        calls = points[0].tolist()
        states: list[Tensor] = []
        landed: list[Tensor] = []
        state = x
        for i in range(len(run)):
            with torch.set_grad_enabled(i in calls):
                if i in calls:
                    m = calls.index(i)
                    state = connect(x, landed[-1]) if landed else x
                    prediction = run.predict(discount(state, self.config.grad_discount), i)
                    landed.append(run.step(prediction, i, self._end(run, points, m)[0], x=state))
                    states.append(x)
                else:
                    prediction = run.predict(x, i)
            with torch.no_grad():
                x = run.advance(run.at(prediction.raw.detach(), x, i), i)
        loss, gradient, logs = self._weighed(x, [*states[1:], x], landed, batch)
        yield self.surrogate(landed[-1], gradient, loss, run, logs)

    def _end(self, run: Rollout, points: Tensor, m: int) -> Tensor:
        """The times, by number, at which leap ``m`` lands."""
        return points[:, m + 1] if m + 1 < points.shape[1] else torch.full_like(points[:, m], len(run))

    def _weighed(
        self, x: Tensor, real: list[Tensor], landed: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, its gradient at the clean samples ``x``, and the logs."""
        seen = self.judge(x, batch.prompts)
        distances = torch.stack([distance(a, b) for a, b in zip(real, landed, strict=True)], 1)
        logs = seen.logs | {"distance_from_base": self.distance(), "d_0": distances[:, -1].nanmean()}
        if distances.shape[1] > 1:
            logs["d_j"] = distances[:, :-1].nanmean()
        weight = torch.ones_like(distances[:, 0])
        if self.config.similarity_weight:
            weight = similarity_weight(distances, self.config.tau)
            logs["similarity_weight"] = weight.nanmean()
        weight = weight.where(weight.isfinite(), 0.0)
        return (weight * seen.loss).mean(), like(weight, x) * seen.gradient / len(x), logs
