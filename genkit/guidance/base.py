"""What a guider is: a rule from a network's predictions at one point of a trajectory to the prediction to follow."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor

from genkit.denoisers.base import Condition, Prediction
from genkit.guidance.point import Guided, Point
from genkit.guidance.protocol import ModularProtocol
from genkit.interpolants import Interpolant
from genkit.registry import unknown

__all__ = ["Guided", "Guider", "Point", "check_range", "within"]


class Guider(ModularProtocol):
    """A guidance rule. Works in :mod:`genkit.sampling`, in ``guided(pipe, guider)`` and in modular pipelines.

    To add one, write one file in this folder. A rule that only combines two predictions implements :meth:`combine`::

        from diffusers.configuration_utils import register_to_config
        from genkit.guidance.base import Guider

        class MyGuidance(Guider):
            @register_to_config
            def __init__(self, *, guidance_scale=3.0, start=0.0, stop=1.0, enabled=True, scheduler_config=None):
                super().__init__(start=start, stop=stop, enabled=enabled, scheduler_config=scheduler_config)
                self.guidance_scale = guidance_scale

            def combine(self, parts, state):
                cond, uncond = parts["cond"], parts["uncond"]
                return cond.with_raw(uncond.raw + self.guidance_scale * (cond.raw - uncond.raw)), state

    A rule that evaluates the network itself (at other points, under other conditions) overrides :meth:`guide`.

    Constructor arguments are keyword-only (Diffusers loses positional ones) and must survive JSON; attributes of the
    same names cannot be changed afterwards, since that would not be saved: ``guider.new(guidance_scale=5)`` copies.

    Attributes:
        takes: what :meth:`using` accepts, with a word on each; ``needs`` names those that a run cannot do without.
        inner: the combination rule of a guider that does something before or after one; see :meth:`hold`.
        needs_uncond: whether the rule asks for the unconditional branch.
        moves_sample: whether the rule answers with a moved point (:attr:`Guided.z`). The sample is then moved before
            the scheduler's step, so schedulers that remember earlier samples are refused.

    Args:
        start, stop: the window, as positions ``1 - t`` on the noise axis: 0 is pure noise, 1 is clean. Outside it the
            conditional prediction is followed, at the cost of one call. ``stop=1`` is on to the end, however many
            stages a solver has.
        enabled: ``False`` always follows the conditional prediction. (``disable()`` is the pipeline's switch, not the
            user's: SDXL's modular pipeline calls ``enable()`` at every run.)
        scheduler_config: what :func:`genkit.attach` stores for modular pipelines; not for users.

    Raises:
        ValueError: a window that is not ``0 <= start < 1``, ``start <= stop <= 1``.
    """

    takes: Mapping[str, str] = {}
    needs: tuple[str, ...] = ()
    needs_uncond = True
    inner: Any = None  # a guider, where hold has been called

    def __init__(
        self,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler_config: dict | None = None,
    ):
        check_range("start", start, 0, 1, open_high=True)
        check_range("stop", stop, start, 1)
        super().__init__(start, stop, enabled, scheduler_config)
        self.start, self.stop = start, stop
        self._given: dict[str, Any] = {}
        self.start_run()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Diffusers' loader looks the base class up in the module that defines the component.
        module = sys.modules.get(cls.__module__)
        if module is not None:  # a file executed by hand has none
            vars(module).setdefault("BaseGuidance", BaseGuidance)

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__ and name in self.__dict__.get("_internal_dict", ()):
            raise AttributeError(
                f"{name}={value!r} would not be saved with the {type(self).__name__}; use guider.new({name}={value!r})"
            )
        super().__setattr__(name, value)

    # -- what JSON cannot hold ------------------------------------------------------------------------------------

    def using(self, **given):
        """A copy that has what a rule needs and JSON cannot hold (a reference image, a classifier, a network).

        It is not saved: give it again after loading. :attr:`takes` names what a rule accepts.

        Raises:
            ValueError: a name that the rule does not take.
        """
        for name in given:
            if name not in self.takes:
                raise ValueError(unknown(f"{type(self).__name__}.using: name", name, self.takes))
        copy = self.new()
        copy._receive(given)
        return copy

    def new(self, **overrides):
        """A copy with other settings, and with all that :meth:`using` gave."""
        copy = super().new(**overrides)
        copy._receive(self._given)
        return copy

    def _receive(self, given: Mapping[str, Any]) -> None:
        self._given |= given
        if self.inner is not None:
            self.inner._receive({name: value for name, value in given.items() if name in self.inner.takes})

    def given(self, name: str) -> Any:
        """What :meth:`using` gave under ``name``; ``None`` if nothing."""
        return self._given.get(name)

    def check(self, shape: tuple[int, ...], condition: Condition | None = None) -> None:
        """Refuse a run on samples of ``shape`` ``(B, ...)`` that cannot work, before the first network call.

        ``condition`` is ``None`` inside somebody else's pipeline. Rules that need more override and extend it.

        Raises:
            ValueError: something is missing that the rule needs, or there is no unconditional branch to guide by.
        """
        missing = [name for name in self.needs if self.given(name) is None]
        if missing:
            raise ValueError(
                f"{type(self).__name__} lacks {missing[0]!r} ({self.takes[missing[0]]}); give it by "
                f"guider.using({missing[0]}=...)"
            )
        if self.needs_uncond and self._switched_on and not self.neutral and condition is not None:
            condition.null()
        if self._uses_inner:
            self.inner.check(shape, condition)

    def check_network(
        self,
        network,
        interpolant: Interpolant,
        prediction_type: str,
        shape: tuple[int, ...],
        condition: Condition | None = None,
    ) -> None:
        """Refuse a network (its path, what it predicts) that the rule cannot work with on samples of ``shape``.

        Called after :meth:`check`, before the network's first call. Nothing by default; rules that bring models of
        their own (a weaker network, a classifier) override and extend it.
        """
        if self._uses_inner:
            self.inner.check_network(network, interpolant, prediction_type, shape, condition)

    # -- a rule inside --------------------------------------------------------------------------------------------

    def hold(self, rule: "Guider") -> None:
        """Make ``rule`` the :attr:`inner` rule, to be asked by ``self.inner.guide``; for constructors.

        This guider then takes and needs what the rule does, checks it, and has its diagnostics beside its own.
        """
        self.inner = rule
        self.takes = {**rule.takes, **self.takes}
        self.needs = (*self.needs, *(name for name in rule.needs if name not in self.needs))
        self.needs_uncond = rule.needs_uncond and not rule.neutral
        self.moves_sample = self.moves_sample or rule.moves_sample

    @property
    def _uses_inner(self) -> bool:
        return self.inner is not None and self._switched_on and not self.neutral

    # -- diagnostics ----------------------------------------------------------------------------------------------

    def start_run(self) -> None:
        """Forget the diagnostics of the last run; called by whoever drives the guider."""
        self._records: list[dict[str, Any]] = []
        self._forget_notes()

    def note(self, **values: Any) -> None:
        """Keep diagnostics of this evaluation for :meth:`stats`: numbers, or tensors with one number a sample."""
        self._notes |= values

    def _forget_notes(self) -> None:
        self._notes: dict[str, Any] = {}
        if self.inner is not None:
            self.inner._forget_notes()

    def _all_notes(self) -> dict[str, Any]:
        return self._notes if self.inner is None else {**self.inner._all_notes(), **self._notes}

    def evaluate(self, point: Point, state: Any, *, made: int = 0) -> tuple[Guided, Any]:
        """:meth:`guide`, recorded for :meth:`stats`; ``made`` network calls have been made for this point already."""
        before = point.denoiser.calls
        self._forget_notes()
        guided, state = self.guide(point, state)
        calls = made + point.denoiser.calls - before
        self._records.append({"t": point.t, "network_calls": calls, **self._all_notes()})
        return guided, state

    def stats(self) -> dict[str, Tensor]:
        """Diagnostics of the last run, a row an evaluation: ``t``, ``network_calls`` and what the rule notes.

        Values per sample have shape ``(E, B)``, others ``(E,)``; NaN where the rule noted nothing.
        """
        rows = [{k: torch.as_tensor(v).detach().double().cpu() for k, v in r.items()} for r in self._records]
        shapes = {name: value.shape for row in rows for name, value in row.items()}
        return {
            name: torch.stack([row.get(name, torch.full(shape, math.nan, dtype=torch.float64)) for row in rows])
            for name, shape in shapes.items()
        }

    # -- the rule -------------------------------------------------------------------------------------------------

    @property
    def neutral(self) -> bool:
        """Whether the settings make the rule return the conditional prediction everywhere, at the cost of one call.

        By default that is ``guidance_scale == 1``; a rule that does more than scale overrides it.
        """
        return getattr(self, "guidance_scale", None) == 1

    def active(self, t: Tensor) -> bool:
        """Whether the rule acts at time ``t``, shape ``()``."""
        if not (self._switched_on and self._enabled) or self.neutral:
            return False
        return within(t, self.start, self.stop)

    def initial(self, index: Tensor) -> Any:
        """The state before the first evaluation of the samples ``index`` ``(B,)`` of the batch that was begun with.

        A rule that is given something per sample remembers it (:class:`genkit.guidance.rows.Rows`).
        """
        return None if self.inner is None else self.inner.initial(index)

    def begun(self, point: Point, state: Any) -> Any:
        """``state``, or :meth:`initial` at the start of a run: what :meth:`guide` asks first, in its window or not."""
        return self.initial(torch.arange(len(point.z), device=point.z.device)) if state is None else state

    def guide(self, point: Point, state: Any) -> tuple[Guided, Any]:
        """The rule: what to follow at ``point``, and the state for the next evaluation.

        Pure given ``state``, which is ``None`` at the start of a run. A state is per sample and has ``gather(index)``,
        so that samples can be re-indexed along the run. A point may be asked for twice (second-order solvers evaluate
        twice at one time): a state that advances must do so once per time.

        Args:
            point: where the network is asked.
            state: ``None``, or what the last call returned.
        """
        conditions = [point.condition]
        if not self.active(point.t):
            (cond,) = point.denoiser.many(point.z, point.t, conditions, timestep=point.timestep)
            return Guided(cond, {"cond": cond}), state
        conditions.append(point.condition.null())
        cond, uncond = point.denoiser.many(point.z, point.t, conditions, timestep=point.timestep)
        parts = {"cond": cond, "uncond": uncond}
        prediction, state = self.combine(parts, state)
        return Guided(prediction, parts), state

    def combine(self, parts: dict[str, Prediction], state: Any) -> tuple[Prediction, Any]:
        """``parts["cond"]`` and ``parts["uncond"]`` to the prediction to follow; ``state`` as in :meth:`guide`."""
        raise NotImplementedError(f"{type(self).__name__} implements neither combine nor guide")


def within(t: Tensor, start: float, stop: float) -> bool:
    """Whether time ``t``, shape ``()``, lies in the window of positions ``1 - t``, both ends included; 0 and 1 are open
    ends."""
    progress, slack = 1 - float(t), 1e-6  # times in float32 and float64 fall on the same side of an edge
    return (start == 0 or progress >= start - slack) and (stop == 1 or progress <= stop + slack)


def check_range(
    setting: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise ``ValueError`` naming setting, value and accepted range unless ``value`` lies in it."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "<" if open_low else "<=", "<" if open_high else "<="
        upper = "" if high == math.inf else f" {right} {high:g}"
        raise ValueError(f"{setting}={value!r}: accepted is {low:g} {left} {setting}{upper}")
