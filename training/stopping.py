"""SIGTERM, with which schedulers announce the end: the run finishes its update, saves and exits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM
"""Exit status of a run that was stopped and can be resumed."""


class Stop:
    """Whether this process was asked to stop."""

    asked = False


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """While entered, SIGTERM sets ``asked``; a second one ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
