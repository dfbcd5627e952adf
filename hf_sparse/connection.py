"""Reads over the network that are tried again when the connection is lost."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

WAITS = (1, 2, 5, 10, 20, 40, 60, 60, 60)
"""Seconds before each new attempt. Before, huggingface_hub has repeated the request itself, for 23 s."""

_PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that another attempt may better."""


class Attempts:
    """Counts failures in a row of what ``of`` names, and waits after each, longer every time."""

    def __init__(self, of: str, waits: Sequence[float] = WAITS) -> None:
        self._of, self._waits, self._failures = of, waits, 0

    def succeeded(self) -> None:
        """What comes now is the first failure again."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Return after a wait if another attempt may help.

        Raises:
            ConnectionError: that was the last one.
            Exception: ``error`` itself, if it is not a lost connection.

        """
        if not is_lost(error):
            raise error
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        self._failures += 1
        if self._failures > len(self._waits):
            raise ConnectionError(
                f"{self._of} cannot be read: the connection was lost {self._failures} times in a row, with "
                f"waits of {sum(self._waits):g} s in all ({said}). Mend the connection and start again."
            ) from error
        wait = self._waits[self._failures - 1]
        warnings.warn(
            f"lost the connection to {self._of} ({said}); attempt {self._failures} of {len(self._waits)} to "
            f"get it back, in {wait:g} s.",
            RuntimeWarning,
            stacklevel=3,
        )
        time.sleep(wait)


def retried(call: Callable[[], T], of: str, waits: Sequence[float] = WAITS) -> T:
    """The result of ``call``, made again while connections are lost; errors as of :class:`Attempts`."""
    attempts = Attempts(of, waits)
    while True:
        try:
            return call()
        except Exception as error:
            attempts.failed(error)


def is_lost(error: Exception) -> bool:
    """Whether ``error`` is of the connection, so that the same again may succeed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    # The second is of the http client that huggingface_hub uses, whichever that is.
    lost: list[type[BaseException]] = [ConnectionError, TimeoutError, HfHubHTTPError.__mro__[1]]
    if "aiohttp" in sys.modules:  # fsspec's, for addresses that begin with https://
        lost.append(sys.modules["aiohttp"].ClientError)
    return isinstance(error, tuple(lost))
