"""Builds the C++ of this folder with the system's compiler on first use, and loads it.

A library is cached under a name made of the source, the compiler's version, the flags, the CPU and the
way of linking, so nothing stale is ever loaded; it is written whole or not at all, so processes may build at
once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from triton_ops.activations import TABLE
from triton_ops.processor import processor_fields
from triton_ops.storage import cache_dir, write_atomically

SOURCE = Path(__file__).with_name("mlp.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
# The compiler finds the formula of each activation by its name (activation.h); its place here is its code.
ACTIVATIONS = f"-DHFS_ACTIVATIONS={','.join(TABLE)}"
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", ACTIVATIONS)
# torch has loaded its OpenMP runtime for all to see. Leaving ours to be found there keeps one thread pool in
# the process; a runtime that does not satisfy this compiler's symbols is linked in the second attempt.
LINKS = (("-shared",), ("-shared", "-fopenmp"))
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The CPU kernels cannot be built or loaded; the message says why."""


@cache
def library() -> ctypes.CDLL | str:
    """The loaded kernels, or the reason why there are none. Tried once per process, warned about once."""
    try:
        return load(SOURCE, COMPILE, LINKS)
    except BuildError as error:
        warnings.warn(
            f"The compiled CPU kernels are not available: {error} Skipping falls back to PyTorch operators, "
            "which is correct and slower; install g++ or clang++ (or set CXX) for full speed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return str(error)


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX`` if set, else the first of g++, c++, clang++.

    Raises:
        BuildError: there is none.

    """
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"CXX={chosen!r} is not an executable.")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (tried g++, c++, clang++).")


def load(source: Path, flags: Sequence[str], links: Sequence[Sequence[str]], about: str = "") -> ctypes.CDLL:
    """The library of ``source``, built if it is not cached.

    Args:
        source: a file of this folder, which includes headers of this folder.
        flags: of the compiler.
        links: the options of one attempt to link after the other.
        about: what else, unseen in the command, the binary depends on.

    Raises:
        BuildError: it cannot be built or loaded.

    """
    command = compiler()
    version = _run([*command, "--version"])
    texts = (file.read_text() for file in (source, *HEADERS))
    key = "\0".join([*texts, version, *command, *flags, about, _cpu()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    folder = cache_dir() / "cpu"
    error: Exception | None = None
    for i, link in enumerate(links):
        path = folder / f"{name}-{i}.so"
        try:
            if path.is_file():
                return ctypes.CDLL(str(path))
            return _build(command, [*flags, "-c", str(source)], link, path)
        except OSError as caught:
            error = caught
    raise BuildError(f"the built library does not load: {error}.")


def _build(command: list[str], flags: list[str], link: Sequence[str], path: Path) -> ctypes.CDLL:
    """Compile, load, and keep at ``path`` for the next process where that can be written."""
    with tempfile.TemporaryDirectory(prefix="hf_sparse-") as folder:
        built, made = Path(folder, "built.o"), Path(folder, "made.so")
        _run([*command, *flags, "-o", str(built)])
        _run([*command, str(built), *link, "-o", str(made)])
        # Loaded first: a library that does not load must not stay behind. Once loaded, its file may go.
        loaded = ctypes.CDLL(str(made))
        with contextlib.suppress(OSError):
            write_atomically(path, made.read_bytes())
        return loaded


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shlex.join(command)}` did not run: {error}.") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        telling = (line for line in lines if "error" in line or "cannot find" in line)
        said = next(telling, lines[-1] if lines else "no output")
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}: {said.strip()}.")
    return done.stdout


def _cpu() -> str:
    """What -march=native depends on: the machine and the CPU's feature flags."""
    fields = processor_fields()
    features = [fields.get(name, "") for name in ("model name", "flags", "Features")]
    return " ".join([platform.machine(), platform.processor(), *features])
