"""Ending a run that was told to end, after the step under way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Raised, after a checkpoint, when the process was told to end; ``code`` is the exit status that says so."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Signals:
    """Notes SIGTERM and SIGINT while it listens; a second one does what it always did."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted. Only the main thread of a process can listen; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in _SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number, _frame) -> None:
            self.received = number
            restore()

        for number in _SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
