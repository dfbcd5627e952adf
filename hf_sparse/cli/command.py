"""What a command is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of ``hf-sparse``; its name is that of the file that it is in."""

    text: str
    """One line of what it does."""
    example: str
    """A command line; the first of several."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """From the options to the exit status."""
    passes_on: bool = False
    """Whether options that it does not have go to the training application, in ``arguments.rest``."""
    manual: str | None = None
    """In the place of argparse's help, where that is the training application's."""
