"""Where this package keeps what it builds and measures."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

ENVIRONMENT = "HF_SPARSE_CACHE"


def cache_dir() -> Path:
    """The folder for compiled kernels and measurements; it need not exist.

    ``$HF_SPARSE_CACHE``, else ``$XDG_CACHE_HOME/hf_sparse``, else ``~/.cache/hf_sparse``.
    """
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "hf_sparse"
    return Path("~/.cache/hf_sparse").expanduser()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all; the last writer wins.

    Raises:
        OSError: the folder cannot be made or written.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
