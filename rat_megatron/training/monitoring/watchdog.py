"""Ends a run that stops making progress, instead of letting it burn its allocation: every rank shows where it stands, then exits."""

from __future__ import annotations

import faulthandler
import functools
import os
import sys
import threading
import time
from collections.abc import Callable

_GRACE = 20.0  # seconds in which ranks whose timers run out a little later show their stacks too


class Watchdog:
    """Once started by its first ``beat``, expects another within ``minutes``; otherwise it writes the stacks of all threads of this rank
    to stderr and exits with code 1. Hung collectives hang every rank, so every rank does so."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._last: float | None = None

    def beat(self) -> None:
        """Says that the run is alive: at every microbatch and around everything that takes long."""
        first, self._last = self._last is None, time.monotonic()
        if first:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        # Written by a thread of C, so also when a hung call holds the interpreter.
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__)

    def stop(self) -> None:
        """The run is over."""
        faulthandler.cancel_dump_traceback_later()
        self._seconds = float("inf")

    def beating(self, function: Callable) -> Callable:
        """Wraps a function so that its beginning and its end are beats."""

        @functools.wraps(function)
        def run(*args, **kwargs):
            self.beat()
            result = function(*args, **kwargs)
            self.beat()
            return result

        return run

    def _watch(self) -> None:
        while (late := time.monotonic() - self._last - self._seconds - _GRACE) < 0:
            time.sleep(min(-late, 5.0))
        print(f"error: no progress for {self._seconds / 60:g} minutes (--rat-hang-timeout-in-mins): this rank gives up", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
