"""Find the members of a family (guiders, schedulers, objectives, metrics ...) by walking its folder.

A member's name is the name of the file it is defined in, so adding a file adds the method.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from typing import TypeVar

T = TypeVar("T")


@cache
def members(package: str, base: type[T]) -> dict[str, type[T]]:
    """``{file name: class}`` for every public subclass of ``base`` defined in a file of ``package``.

    Raises:
        TypeError: a file defines more than one such class (its name would be ambiguous).
    """
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        hasattr(module, "__all__")  # runs a module that so far was only registered; ``vars`` alone would not
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, base)
            and value is not base
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        if len(classes) > 1:
            raise TypeError(f"{module.__name__} defines {[c.__name__ for c in classes]}; one {base.__name__} a file")
        if classes:
            found[info.name] = classes[0]
    return found


def file_names(package: str) -> list[str]:
    """The names that members of a family can have, its files but ``base``, without running any: for help texts."""
    path = importlib.import_module(package).__path__
    return sorted(info.name for info in pkgutil.iter_modules(path) if info.name[0] != "_" and info.name != "base")


def member_class(package: str, base: type[T], name: str) -> type[T]:
    """The member whose class is called ``name``, for a package's ``__getattr__``.

    Raises:
        AttributeError: there is none.
    """
    if not name.startswith("_"):
        for cls in members(package, base).values():  # type: ignore[arg-type]
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def lookup(package: str, base: type[T], name: str, *, setting: str) -> type[T]:
    """The member called ``name``, or a ``ValueError`` that names the setting, the value and the choices."""
    known = members(package, base)  # type: ignore[arg-type]  # mypy does not see that classes are hashable
    if name not in known:
        raise ValueError(unknown(setting, name, known))
    return known[name]


def unknown(setting: str, value: object, accepted) -> str:
    """The text of an error about ``value``: what was set, what was got, what is accepted, and the nearest match."""
    accepted = sorted(map(str, accepted))
    near = difflib.get_close_matches(str(value), accepted, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{setting}={value!r} is not known{hint} Accepted: {', '.join(accepted)}."
