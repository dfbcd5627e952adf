"""The progress bar: how far, how long, and how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

_NOT_SHOWN = ("loss", "gradient_norm")


class ProgressBar:
    """Updates done and time left, by tqdm; and beside them what the last log record says."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        self._bar = tqdm(
            total=steps, initial=done, desc="training", unit="step", dynamic_ncols=True, disable=not shown
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more update is done."""
        self._bar.update()

    def tell(self, means: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Show the ``means`` of the terms of the loss, and what else is in a ``record`` of the log."""
        said = {"loss": f"{means['loss']:.3f}"} if means else {}  # none if every update was left out
        if (sparsity := record.get("sparsity")) is not None:
            said["sparsity"] = f"{sparsity:.1%}"
        said |= {name: f"{value:.3g}" for name, value in means.items() if name not in _NOT_SHOWN}
        said["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        self._bar.set_postfix(said, refresh=False)

    def write(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line)
