"""Choices of backends that have been applied, and are undone in order."""

from contextlib import ExitStack
from itertools import count
from typing import Any
from weakref import WeakSet

from genkit.attention.coverage import Coverage
from genkit.attention.rerouting import unrerouted


class Use:
    """A choice of backends that has been applied: by ``backend``, for each network its name.

    As a context manager, and by :meth:`restore`, it puts everything back as it was. Choices made on top of each other
    are undone in the reverse order; one that nobody holds any more stays until the choice below it is undone.
    """

    _live: WeakSet["Use"] = WeakSet()
    _number = count()

    def __init__(self, backend: dict[str, str], coverage: Coverage, undo: ExitStack, changed: list[Any]):
        self.backend, self.coverage, self._undo = backend, coverage, undo
        self._changed = {id(part): part for part in changed}
        rerouted = [record.module for record in coverage if record.way == "rerouted"]
        self._classes = [(module, unrerouted(module)) for module in rerouted]
        self._order = next(self._number)
        self._live.add(self)

    def restore(self) -> None:
        """Put everything back; a second time does nothing.

        Raises:
            RuntimeError: a later choice for the same attention, or another change of a module's class, was not undone
                before. Nothing has been changed then.
        """
        if self not in self._live:
            return
        later = [use for use in self._live if use._order > self._order and use._changed.keys() & self._changed.keys()]
        if later:
            last = max(later, key=lambda use: use._order)
            raise RuntimeError(
                f"attention backend {_named(self)} cannot be undone before {_named(last)}, which was chosen on top of "
                "it; undo that first"
            )
        for module, kind in self._classes:
            if unrerouted(module) is not kind:
                raise RuntimeError(
                    f"the class of a {kind.__name__} was changed later than its backend; undo that first"
                )
        self._live.remove(self)
        self._undo.close()

    def __enter__(self) -> "Use":
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def _named(use: Use) -> str:
    return ", ".join(map(repr, dict.fromkeys(use.backend.values())))
