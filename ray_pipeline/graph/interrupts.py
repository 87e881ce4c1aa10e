"""SIGINT and SIGTERM while stages are at work: the first ends them gracefully, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ray_pipeline.graph.progress import ProgressBoard

#: Seconds for calls in progress after the first signal. Replies are written as they come.
GRACE_SECONDS = 10.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; finished work is kept.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Interrupts:
    """Takes both signals while its `with` block runs, in the main thread; in another thread it does nothing.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since: float | None = None
        self._at_once = self._passed_on = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._at_once or self.number is not None:
            raise Interrupted(self.number or number)
        self.number, self._since = number, time.monotonic()

    def end_now(self, number: int = signal.SIGINT) -> None:
        """End the main thread as a second signal does."""
        self._at_once = True
        os.kill(os.getpid(), number)

    def pass_on(self, board: ProgressBoard, say: Callable[[str], None]) -> None:
        """Stop the stages if a signal came, and end at once if they take too long. Called in a thread, repeatedly."""
        if self.number is None or self._since is None:
            return
        if not self._passed_on:
            self._passed_on = True
            name = signal.Signals(self.number).name
            say(
                f"{name}: no further call is made; waiting up to {GRACE_SECONDS:g} s for calls in progress and for "
                "their replies to be written; interrupt again to end at once"
            )
            board.stop("*", f"interrupted by {name}")
        elif time.monotonic() - self._since > GRACE_SECONDS and not self._at_once:
            self.end_now(self.number)
