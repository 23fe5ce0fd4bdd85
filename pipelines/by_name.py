"""Guiders, schedulers, rewards and steps by name, as a command line writes them: ``apg:guidance_scale=4,eta=0``."""

import ast
import inspect
import re
from collections.abc import Iterable
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import ValidationError

from genkit.guidance.base import Guider
from genkit.registry import lookup, members, unknown
from genkit.rewards import Reward
from genkit.rewards import make as make_reward
from genkit.schedulers.base import PathScheduler
from genkit.step_annealing import KINDS, StepAnnealer

# A path, a name on the Hub or file.py:name, bare, as a whole value; it has a letter, so that 1/2 is none.
_BARE = re.compile(r"(?<==)\s*(?=[^,]*[:/\\])(?=[^,]*[A-Za-z])[\w.~:/\\-]+\s*(?=,|$)")


def parse_settings(setting: str, text: str, accepted: Iterable[str] | None = None) -> dict[str, Any]:
    """``key=value,key=value`` with values as Python literals; a bare word, path or Hub name stands for itself.

    Args:
        setting: what it is, for errors.
        accepted: the keys; anything if left out.

    Raises:
        ValueError: text of another form, or an unknown key.
    """
    try:
        found = _keywords(text)
    except (SyntaxError, ValueError):
        try:
            found = _keywords(_BARE.sub(lambda match: repr(match[0].strip()), text))
        except (SyntaxError, ValueError):
            raise ValueError(
                f"{setting}: {text!r} is not of the form key=value,key=value; texts other than words and paths take "
                "quotes: key='some text'"
            ) from None
    for key in found:
        if accepted is not None and key not in accepted:
            raise ValueError(unknown(f"{setting}: setting", key, accepted))
    return found


def _keywords(text: str) -> dict[str, Any]:
    call = ast.parse(f"_({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise SyntaxError
    return {str(k.arg): _value(k.value) for k in call.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.List):
        return [_value(element) for element in node.elts]
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def parse_guider(text: str) -> Guider:
    """A guider from ``name`` or ``name:key=value,key=value``, values as Python literals.

    Raises:
        ValueError: an unknown name or setting, a value that the guider refuses, or a guider that needs what no text can
            hold.
    """
    name, _, rest = text.partition(":")
    known = members("genkit.guidance", Guider)
    if name not in known:
        raise ValueError(unknown("guider", name, [n for n, cls in known.items() if not cls.needs]))
    settings = parse_settings(f"guider {name!r}", rest, _arguments(known[name], "scheduler_config"))
    guider = known[name](**settings)
    if guider.needs:  # its own, or those of the rule inside it
        need = guider.needs[0]
        raise ValueError(
            f"guider={text!r} needs {need!r} ({guider.takes[need]}), which a text cannot give: it can be used from "
            f"Python only, as {known[name].__name__}(...).using({need}=...)"
        )
    return guider


def parse_scheduler(text: str, scheduler: Any) -> Any:
    """A scheduler, as :func:`parse_guider` has guiders, for a model that is sampled with ``scheduler``.

    The name is that of a file of ``genkit.schedulers`` (``pndm``) or of a class of Diffusers
    (``DPMSolverMultistepScheduler``); the path of the model's samples is kept.

    Raises:
        ValueError: an unknown name or setting, or a value that the scheduler refuses.
    """
    name, _, rest = text.partition(":")
    own = members("genkit.schedulers", PathScheduler)
    if name in own:
        settings = parse_settings(f"scheduler {name!r}", rest, _arguments(own[name], "path"))
        return own[name].from_scheduler(scheduler, **settings)
    theirs = {n: c for n in dir(diffusers) if n.endswith("Scheduler") and _is_scheduler(c := getattr(diffusers, n))}
    if name not in theirs:
        raise ValueError(unknown("scheduler", name, [*own, *theirs]))
    settings = parse_settings(f"scheduler {name!r}", rest, _arguments(theirs[name]))
    config = scheduler.config.get("path") or scheduler.config
    return theirs[name].from_config(config, **settings)


def parse_reward(text: str) -> Reward:
    """A reward from ``name`` or ``name:key=value,key=value``, values as Python literals.

    Raises:
        ValueError: an unknown name or setting, or a value that the reward refuses.
    """
    name, _, rest = text.partition(":")
    cls = lookup("genkit.rewards", Reward, name, setting="reward")
    settings = parse_settings(f"reward {name!r}", rest, cls.Config.model_fields)
    try:
        return make_reward(name, **settings)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"reward {name!r}: {wrong}") from None


def parse_steps(text: str) -> int | StepAnnealer:
    """A number of steps, or for networks with a diffusion head how they fall: ``linear:hi=50,lo=5``, or of how many in
    all: ``linear:budget=400,lo=5``.

    Raises:
        ValueError: neither a whole number nor a kind of :class:`~genkit.step_annealing.StepAnnealer`, an unknown
            setting, or a value that it refuses.
    """
    kind, _, rest = text.strip().partition(":")
    if kind in KINDS:
        settings = parse_settings(f"num_inference_steps {kind!r}", rest, ("hi", "lo", "budget"))
        return StepAnnealer(kind=kind, **settings)
    try:
        return int(text)
    except ValueError:
        raise ValueError(unknown("num_inference_steps", kind, ["a whole number", *KINDS])) from None


def _is_scheduler(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, SchedulerMixin)


def _arguments(cls: type, *hidden: str) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *hidden)]  # type: ignore[misc]
