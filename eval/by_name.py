"""Metrics, extractors and lists as a command line writes them: ``kid:subset_size=100``, ``reward:clip_score``."""

import inspect
import re
from typing import TypeVar

from genkit.registry import lookup
from genkit.step_annealing import KINDS, StepAnnealer

T = TypeVar("T")

_SETTING = re.compile(r"\s*\w+\s*=")


def make(package: str, base: type[T], text: str, *, setting: str) -> T:
    """The member of ``package`` called ``name``, from ``name``, ``name:key=value,key=value`` or ``name:value``.

    Values are Python literals, words or paths. A bare value is for classes that name the one argument that it is
    (``argument``).

    Raises:
        ValueError: an unknown name or setting, one that is missing, a value that is not accepted.
    """
    name, colon, rest = text.partition(":")
    cls = lookup(package, base, name.strip(), setting=setting)
    parameters = inspect.signature(cls).parameters
    argument = getattr(cls, "argument", None)
    settings = {}
    if _SETTING.match(rest):
        from genkit.pipelines.by_name import parse_settings

        settings = parse_settings(f"{setting} {name!r}", rest, parameters)
    elif argument and rest:
        settings = {argument: rest}
    needed = {k for k, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if (colon and not settings) or needed - settings.keys():
        accepted = f"{name}:{argument.upper()}" if argument else f"{name}:{', '.join(f'{k}=...' for k in parameters)}"
        raise ValueError(f"{setting}={text!r}: accepted is {accepted if parameters else name!r}{_said(cls, argument)}")
    return cls(**settings)


def _said(cls: type, argument: str | None) -> str:
    """What the docstring says of an argument."""
    found = argument and re.search(
        rf"^ *{argument}: (.*?)(?=\n *\w+(?:, \w+)*: |\n *\n|\Z)", inspect.getdoc(cls) or "", re.M | re.S
    )
    if not argument or not found:
        return ""
    plain = re.sub(r":\w+:`~?([^`]*)`|``", lambda m: m[1] or "", found[1])
    return f" ({argument.upper()}: {' '.join(plain.split()).rstrip('.')})"


def split(text: str) -> list[str]:
    """``fid,kid:subset_size=100,subsets=50,prdc`` is three: what begins with ``key=`` belongs to the one before."""
    found: list[str] = []
    for part in text.split(","):
        if found and _SETTING.match(part):
            found[-1] += "," + part
        else:
            found.append(part.strip())
    return found


def several_steps(text: str) -> list[int | StepAnnealer]:
    """``1,4,linear:hi=50,lo=5`` is three: numbers of steps, and how those of a diffusion head fall.

    Raises:
        ValueError: one that is neither.
    """
    from genkit.pipelines.by_name import parse_steps

    found: list[int | StepAnnealer] = []
    for part in split(text):
        if part.partition(":")[0] not in KINDS and not re.fullmatch(r"[-+]?\d+", part):
            raise ValueError(
                f"steps={part!r}: expected whole numbers, separated by commas, or how those of a diffusion head fall, "
                "as linear:hi=50,lo=5"
            )
        found.append(parse_steps(part))
    return found
