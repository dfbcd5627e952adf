"""How fast a run is, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Speed:
    """Since the last call, without pauses: tokens per second over all processes, and waiting in this one."""

    def __init__(self, tokens: int) -> None:
        """``tokens``: those of the run before."""
        self._tokens, self._since, self._pause, self._wait = tokens, time.perf_counter(), 0.0, 0.0

    def __call__(self, tokens: int) -> dict[str, float]:
        """For the log; ``tokens`` are those of the run until now. ``data_wait`` is a share of the time."""
        now = time.perf_counter()
        seconds = max(now - self._since - self._pause, 1e-9)
        values = {
            "tokens_per_second": round((tokens - self._tokens) / seconds, 1),
            "data_wait": round(min(self._wait / seconds, 1.0), 4),
        }
        self._tokens, self._since, self._pause, self._wait = tokens, now, 0.0, 0.0
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin
