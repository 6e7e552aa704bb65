"""Stop: a request to stop, made by a signal handler; the work checks it between blocks, so no block is torn."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stream_reshard.errors import Interrupted


class Stop:
    """A possible request to stop the run, shared by all threads. Pickled to another process it is a new one without a
    request, so that a worker there finishes its job."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_number = 0
        """The signal that asked for the stop; 0 if a failure in another part of the run did."""
        self.is_awaited = False
        """The work calls `check` often now; while False, a signal handler has to raise Interrupted itself."""

    def __reduce__(self) -> tuple[type[Stop], tuple[()]]:
        return Stop, ()

    def request(self, signal_number: int = 0) -> None:
        """Ask for a stop; of several signals the first is kept."""
        self.signal_number = self.signal_number or signal_number
        self._event.set()

    def check(self) -> None:
        """Raises Interrupted if a stop was asked for."""
        if self._event.is_set():
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """The error that ends a stopped run."""
        if not self.signal_number:
            return Interrupted("stopped, because another part of the run failed")
        return Interrupted(f"interrupted by {signal.Signals(self.signal_number).name}", self.signal_number)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """A context in which the work calls `check` between blocks."""
        before, self.is_awaited = self.is_awaited, True
        try:
            yield
        finally:
            self.is_awaited = before
