"""Particle methods: weigh samples as they are denoised, and resample them within the group of their prompt."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Condition, Denoiser
from genkit.feynman_kac.entropic import EntropicAnnealing
from genkit.feynman_kac.log_weights import LogWeights
from genkit.feynman_kac.resampling import check_resampler
from genkit.guidance.base import Guider, check_range, within
from genkit.guidance.moves import keeps_history
from genkit.registry import unknown
from genkit.rng import ItemRNG
from genkit.sampling import State, visited_times


class FeynmanKac(ABC):
    """What particle methods share; a subclass says how samples are weighed (:meth:`weigh`).

    To add one, write one file in this folder (CONTRIBUTING.md has one). What :meth:`weigh` wants to know of a particle
    later goes through ``memory``, which is re-indexed with the samples, never through ``self``. A constructor passes on
    to this one the settings that make sense for its method, usually all.

    Give it to :func:`genkit.sampling.trajectory` as ``particles``, with ``num_particles`` consecutive samples a prompt
    (``condition.repeat(num_particles)``). ``state.log_weights`` of the last state belongs to the final samples.

    At every evaluation: add the increment of the weights; if the effective sample size of a group is below
    ``ess_threshold * num_particles``, resample it together with its predictions. Neither the first evaluation, whose
    samples are independent, nor the last, after which there is nothing left to branch, resamples.

    Random numbers of a group are derived from the state of its first sample's generator, without advancing it: a run
    without need for resampling gives the samples of plain sampling bit for bit, and with a generator a sample a group
    does not depend on the others.

    Attributes:
        memory_size: ``M``, float64 numbers that :meth:`weigh` remembers of a particle; 0 at the start.
        times: of every evaluation, and 0 for the end, float64 ``(E + 1,)``; this and what follows from
            :meth:`start_run` on.
        last: number of the last evaluation, ``E - 1``.
        denoiser, condition, guider: what the run was started with.

    Args:
        num_particles: ``K``, particles a prompt. 1 is plain sampling.
        resampler: see :func:`genkit.feynman_kac.resampling.resample`.
        ess_threshold: in [0, 1]: 0 never resamples, 1 at every evaluation.
        start, stop: window of resampling, as positions ``1 - t`` on the noise axis (0 is pure noise).
        weights_outside: ``keep`` increments outside the window (unbiased), or ``drop`` them (what published image
            experiments do).
        increment_clip: finite increments further than this from their group's mean, in nats, are cut: less variance,
            but biased. ``stats()["clipped"]`` tells how often.
        annealing: flattens what ancestors are drawn from; see
            :class:`genkit.feynman_kac.entropic.EntropicAnnealing`.

    Raises:
        ValueError: a setting out of range; before a run: a batch that is no whole number of groups, prompts mixed in a
            group, a flow map, a scheduler with a history that cannot be re-indexed, ``drop`` with a window in which the
            method never weighs.
    """

    memory_size = 0

    def __init__(
        self,
        num_particles: int = 8,
        *,
        resampler: str = "systematic",
        ess_threshold: float = 0.5,
        start: float = 0.0,
        stop: float = 1.0,
        weights_outside: str = "keep",
        increment_clip: float | None = None,
        annealing: EntropicAnnealing | None = None,
    ):
        if num_particles != int(num_particles) or num_particles < 1:
            raise ValueError(f"num_particles={num_particles}: must be an integer of at least 1")
        check_resampler(resampler)
        check_range("ess_threshold", ess_threshold, 0, 1)
        check_range("start", start, 0, 1, open_high=True)
        check_range("stop", stop, start, 1)
        if weights_outside not in ("keep", "drop"):
            raise ValueError(unknown("weights_outside", weights_outside, ("keep", "drop")))
        if increment_clip is not None:
            check_range("increment_clip", increment_clip, 0, open_low=True)
        self.num_particles = int(num_particles)
        self.resampler = resampler
        self.ess_threshold = ess_threshold
        self.start, self.stop = start, stop
        self.weights_outside = weights_outside
        self.increment_clip = increment_clip
        self.annealing = annealing
        self._forget()

    # -- the rule -------------------------------------------------------------------------------------------------

    @abstractmethod
    def weigh(self, state: State, memory: Tensor) -> tuple[State, Tensor, Tensor]:
        """The state to go on with, the increment of the log-weights ``(N, K)``, and the memory ``(N, K, M)`` to keep.

        The increment and the memory are float64 and on the CPU (:meth:`grouped`). An increment that is not finite kills
        the particle.

        Args:
            state: after an evaluation: ``x`` at ``t``, the predictions ``state.guided``; ``state.i`` numbers it.
            memory: what was kept of these samples.
        """

    def weighs_at(self) -> Collection[int]:
        """Numbers of the evaluations where :meth:`weigh` is asked and groups can be resampled; all by default.

        Asked during a run, so that :attr:`times` and :attr:`last` are known.
        """
        return range(self.last + 1)

    def look_ahead(self, state: State, memory: Tensor) -> Tensor | None:
        """What is known of the particles' next increments, ``(N, K)`` nats; nothing by default.

        Asked only where some group is to be resampled; may call the network.
        """
        return None

    # -- the run --------------------------------------------------------------------------------------------------

    def start_run(self, denoiser: Denoiser, scheduler, x: Tensor, condition: Condition, guider: Guider | None) -> None:
        """Refuse what cannot work (see the class), and forget the diagnostics of the last run.

        A method that cannot work with every scheduler or guider extends it.
        """
        if hasattr(scheduler, "jump_target"):
            raise ValueError(
                f"scheduler={type(scheduler).__name__}: particles weigh clean-sample predictions, which the jumps of a "
                "flow map do not give; use a one-time scheduler"
            )
        if keeps_history(scheduler) and not hasattr(scheduler, "gather"):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} remembers earlier steps and cannot re-index them for particles; "
                "use one without history, such as ExactDenoiserScheduler or DDIMScheduler"
            )
        if len(x) % self.num_particles:
            raise ValueError(
                f"num_particles={self.num_particles}: {len(x)} samples are no whole number of groups; give every "
                "prompt num_particles consecutive samples (condition.repeat(num_particles))"
            )
        self.check_groups("condition", condition)
        self.denoiser, self.condition, self.guider = denoiser, condition, guider
        self.times = visited_times(denoiser, scheduler)
        self.last = len(self.times) - 2
        if bool((self.times.diff() >= 0).any()):
            raise ValueError(
                f"scheduler={type(scheduler).__name__} visits a time twice (several stages a step); particles are "
                "weighed between samples, so use one with a single evaluation a step"
            )
        self._weighs_at = sorted(self.weighs_at())
        inside = [i for i in self._weighs_at if within(self.times[i], self.start, self.stop)]
        if self.weights_outside == "drop" and not inside:
            raise ValueError(
                f"weights_outside='drop' with start={self.start}, stop={self.stop}: {type(self).__name__} weighs at "
                f"t={[round(float(self.times[i]), 4) for i in self._weighs_at]}, never in that window; widen it, or "
                "keep the weights"
            )
        self._opportunities = [i for i in inside if i > 0]
        self._forget()

    def check_groups(self, setting: str, condition: Condition) -> None:
        """Raise ``ValueError`` where the samples of one group are to be generated under different conditions."""
        for name, value in (*condition.values.items(), *(condition.null_values or {}).items()):
            groups = value.reshape(-1, self.num_particles, *value.shape[1:])
            same = (groups == groups[:, :1]).flatten(1).all(1)
            if not bool(same.all()):
                n = int((~same).nonzero()[0])
                raise ValueError(
                    f"{setting}: {name!r} differs within group {n} of num_particles={self.num_particles} samples; a "
                    "group belongs to one prompt"
                )

    def after_evaluation(self, state: State) -> State:
        """Weigh the samples, and resample the groups that need it."""
        count = self.num_particles
        if state.i == 0:
            self._seeds = _seeds(state.generators, len(state.x) // count, count)
        self._notes.clear()
        log_weights = state.log_weights or LogWeights.equal(len(state.x) // count, count, self.memory_size)
        memory = log_weights.memory
        increment = torch.zeros_like(log_weights.values)
        if state.i in self._weighs_at:
            state, increment, memory = self.weigh(state, memory)
        if self.weights_outside == "drop" and not within(state.t, self.start, self.stop):
            increment = torch.zeros_like(increment)
        self.note(**{f"increment_{name}": f(increment) for name, f in _SPREADS.items()})
        if self.increment_clip is not None:
            increment, clipped = _clip(increment, self.increment_clip)
            self.note(clipped=clipped)
        log_weights = replace(log_weights.add(increment), memory=memory)
        self.note(ess=log_weights.ess)
        state, ancestors, temperature = self._resample(replace(state, log_weights=log_weights))
        assert state.log_weights is not None
        self.note(ancestors=ancestors, temperature=temperature)
        self.note(log_z=state.log_weights.log_z, distinct_roots=state.log_weights.distinct_roots)
        self._records.append({"t": state.t, **self._notes})
        return state

    def _resample(self, state: State) -> tuple[State, Tensor, Tensor]:
        log_weights = state.log_weights
        assert log_weights is not None
        n, count = log_weights.values.shape
        index = torch.arange(count).expand(n, count)
        temperature = torch.ones(n, dtype=torch.float64)
        share = log_weights.ess / count
        needy = share < self.ess_threshold if self.ess_threshold < 1 else torch.ones(n, dtype=torch.bool)
        if state.i not in self._opportunities or state.i == self.last or count == 1 or not bool(needy.any()):
            return state, index, temperature
        if self.annealing is not None:
            progress = (self._opportunities.index(state.i) + 1) / len(self._opportunities)
            temperature = self.annealing.temperature(log_weights, progress)
        resampled, index = log_weights.resample(
            self.resampler,
            # Named by the evaluation, not counted, so that what other groups needed before does not enter.
            ItemRNG(state.i, self._seeds),
            where=needy,
            temperature=temperature,
            modulation=self.look_ahead(state, log_weights.memory),
            residual=self.annealing is None or self.annealing.residual,
        )
        rows = (index + torch.arange(n)[:, None] * count).flatten()
        # A slot keeps its own generator: copies of one particle would otherwise draw from the same one.
        moved = replace(state.gather(rows.to(state.x.device)), generators=state.generators)
        return replace(moved, log_weights=resampled), index, temperature

    def grouped(self, values: Tensor) -> Tensor:
        """One number a sample, ``(B,)``, as float64 ``(N, K)`` on the CPU."""
        return values.detach().cpu().double().view(-1, self.num_particles)

    # -- diagnostics ----------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._notes: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Keep diagnostics of this evaluation for :meth:`stats`: numbers, or tensors with one a group or a particle."""
        self._notes |= values

    def stats(self) -> dict[str, Tensor]:
        """Diagnostics of the last run, a row an evaluation (``E`` of them, ``N`` groups, ``K`` particles).

        ``t`` ``(E,)``; ``ess`` before resampling, ``distinct_roots`` after it, ``log_z``, ``temperature``, the
        spread of the increments before clipping (``increment_min``, ``increment_max``, ``increment_std``) and, with
        ``increment_clip``, ``clipped``, the share of increments that it cut: ``(E, N)``; ``ancestors`` ``(E, N, K)``,
        the genealogy: slot of the last evaluation that each particle continues; and what the method notes, NaN at
        evaluations where it noted nothing.
        """
        rows = [{k: torch.as_tensor(v).detach().cpu() for k, v in record.items()} for record in self._records]
        shapes = {name: value.shape for row in rows for name, value in row.items()}
        return {
            name: torch.stack([row.get(name, torch.full(shape, math.nan, dtype=torch.float64)) for row in rows])
            for name, shape in shapes.items()
        }


def check_rewards(rewards: Tensor, batch: int) -> Tensor:
    """``rewards``, if it is one number a sample.

    Raises:
        ValueError: another shape.
    """
    if rewards.shape != (batch,):
        raise ValueError(f"reward must return one number a sample, shape ({batch},), got {tuple(rewards.shape)}")
    return rewards


_SPREADS = {
    "min": lambda increment: increment.amin(1),
    "max": lambda increment: increment.amax(1),
    "std": lambda increment: increment.std(1, correction=0),
}


def _clip(increment: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    finite = increment.isfinite()
    centre = increment.where(finite, math.nan).nanmean(1, keepdim=True)
    off = increment - centre
    # The dead stay dead: a bound would give them a weight again.
    clipped = (off.clamp(-clip, clip) + centre).where(finite, increment)
    return clipped, ((off.abs() > clip) & finite).double().mean(1)


def _seeds(generators: Sequence[torch.Generator] | torch.Generator | None, groups: int, count: int) -> list[int]:
    """What the groups' resampling is seeded with: the generator of a group's first sample, or one and a number."""
    if isinstance(generators, Sequence):
        return [_seed(g, 0) for g in generators[::count]]
    generator = torch.default_generator if generators is None else generators
    return [_seed(generator, n) for n in range(groups)]


def _seed(generator: torch.Generator, number: int) -> int:
    state = generator.get_state().cpu().numpy().tobytes() + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little") >> 1
