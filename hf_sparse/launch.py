"""Starts the training application by its file path, wherever it was installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_NEEDED = ("accelerate", "datasets", "yaml")


def application() -> Path:
    """The folder of the training application: ``training/`` in a clone, inside the package in a wheel.

    Raises:
        FileNotFoundError: neither is there.

    """
    package = Path(__file__).parent
    for folder in (package / "_training", package.parent / "training"):
        if (folder / "finetune.py").is_file():
            return folder
    raise FileNotFoundError(f"no training/finetune.py beside {str(package)!r}; reinstall hf-sparse.")


def finetune(arguments: Sequence[str], *, launcher: Sequence[str] | None = None) -> int:
    """Run ``accelerate launch <launcher> finetune.py <arguments>`` to its end; returns its exit status.

    Args:
        arguments: for ``finetune.py``. ``--config NAME`` of a recipe that ships with it needs no path.
        launcher: options of ``accelerate launch``, such as ``["--num_processes", "8"]``. None means what
            ``accelerate config`` has set up, else one process on this machine, started directly.

    Raises:
        ImportError: what training needs is not installed.

    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'hf-sparse[train]'")
    folder = application()
    command = [sys.executable]
    # One process needs no launcher, which would add a traceback of its own to every message.
    if not {"-h", "--help"}.intersection(arguments) and (launcher is not None or _is_configured()):
        command += ["-m", "accelerate.commands.launch", *(launcher or ())]
    script = [str(folder / "finetune.py"), *_with_recipe_path(arguments, folder / "recipes")]
    return subprocess.run([*command, *script], check=False).returncode


def _is_configured() -> bool:
    from accelerate.commands.config.config_args import default_config_file

    return Path(default_config_file).is_file()


def _with_recipe_path(arguments: Sequence[str], recipes: Path) -> list[str]:
    resolved = list(arguments)
    for i, argument in enumerate(resolved):
        head, equals, name = argument.rpartition("=")
        is_value = head == "--config" or (not equals and i and resolved[i - 1] == "--config")
        shipped = recipes / f"{name}.yaml"
        if is_value and not Path(name).is_file() and shipped.is_file():
            resolved[i] = f"{head}{equals}{shipped}"
    return resolved
