"""An exit signal that comes before Megatron listens for it: remembered, so that the run still saves after its first iteration."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any


class EarlyExitSignal:
    """Catches SIGTERM from the start of a program with --exit-signal-handler, which Megatron does only once everything is set up."""

    def __init__(self):
        self._received = False
        if "--exit-signal-handler" in sys.argv:
            signal.signal(signal.SIGTERM, self._remember)

    def handed_over(self, train_step: Callable) -> Callable:
        """Wraps Megatron's ``train_step`` so that its own handler, by then in place, learns of the signal."""

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._received:
                from megatron.training.global_vars import get_signal_handler

                get_signal_handler()._signal_received = True
                self._received = False
            return train_step(*args, **kwargs)

        return step

    def _remember(self, *_: Any) -> None:
        self._received = True
