"""Checkpoints that are whole or not there: written aside, verified by hash, continued from exactly.

``folder/step-00000250/`` holds what ``accelerator.save_state`` writes (weights as safetensors, optimizer,
random states of every process), one JSON file for each data stream, ``state.json``, and ``manifest.json``
with the size and SHA-256 of every other file. It is written under a name that begins with ``.incomplete-``
and renamed when all processes are done and everything is on disk, so a crash at any moment leaves the earlier
checkpoints as they were.

All processes must see the same folder; on several machines it lies on a shared file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from data import StreamState
from safetensors import SafetensorError
from safetensors.torch import load_model
from sharding import layout
from torch import nn

FORMAT_VERSION = 1
_INCOMPLETE = ".incomplete-"
_WEIGHTS = "model.safetensors"
_UNWRITABLE = (OSError, RuntimeError, SafetensorError)
"""What writing on a full disk raises."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says why and what to do."""


@dataclass
class Progress:
    """How far a run has come: everything but weights, optimizer and random states."""

    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Tokens trained on, over all processes."""
    skipped: int = 0
    """Updates that were left out since their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those since the last that was made."""
    pending: dict[str, list[float]] = field(default_factory=dict)
    """Values per update since the last log record, by name."""
    methods: dict[str, Any] = field(default_factory=dict)
    """State of the methods at work, as their ``state_dict`` gives it."""
    streams: dict[int, StreamState] = field(default_factory=dict)
    """Position of each data stream: of this process when saving, of all when loading."""


_COUNTED = tuple(f.name for f in fields(Progress) if f.name != "streams")


class Checkpoints:
    """The checkpoints of one run. All methods but ``__init__`` are to be called by all processes together."""

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int) -> None:
        self._accelerator, self._folder, self._keep = accelerator, folder, keep
        self._others: list[Callable[[Path], None]] = []
        accelerator.register_save_state_pre_hook(_bare_weights)
        accelerator.register_load_state_pre_hook(_load_bare_weights)

    def also(self, write: Callable[[Path], None]) -> None:
        """Have ``write`` add a file to the folder of each checkpoint; all processes call it."""
        self._others.append(write)

    def save(self, progress: Progress, recipe: dict[str, Any]) -> Path:
        """Write a checkpoint of the prepared model, optimizer and random states, and ``progress``.

        Raises:
            CheckpointError: it could not be written, as on a full disk, or a process wrote its files
                elsewhere (the folder is not shared). Earlier checkpoints are as they were.

        """
        final = self._folder / f"step-{progress.step:08d}"
        aside = self._folder / f"{_INCOMPLETE}{final.name}"
        for part in (self._begin, self._write, self._finish):
            self._together(part, aside, final, progress, recipe)
        return final

    def _begin(self, aside: Path, final: Path, progress: Progress, recipe: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write(self, aside: Path, final: Path, progress: Progress, recipe: dict[str, Any]) -> None:
        self._accelerator.save_state(str(aside))
        for write in self._others:
            write(aside)
        for stream, place in progress.streams.items():
            _write_json(aside / _stream_file(stream), asdict(place))

    def _finish(self, aside: Path, final: Path, progress: Progress, recipe: dict[str, Any]) -> None:
        if not self._accelerator.is_main_process:
            return
        state = {name: getattr(progress, name) for name in _COUNTED}
        placed = {"layout": layout(self._accelerator), "processes": self._accelerator.num_processes}
        _write_json(aside / "state.json", {**state, **placed, "recipe": recipe})
        streams = range(recipe["data_streams"])
        if missing := [f for v in streams if not (aside / (f := _stream_file(v))).exists()]:
            raise CheckpointError(
                f"{', '.join(missing)} did not arrive in {aside}: output_dir must be a folder that all "
                "processes share."
            )
        _write_manifest(aside)
        for later in [path for path in self._all() if path.name >= final.name]:
            _discard(later)  # damaged ones, which the run was not resumed from
        os.rename(aside, final)
        _sync(self._folder)
        for old in self._all()[self._keep :]:
            _discard(old)

    def _together(self, part: Callable[..., None], aside: Path, final: Path, *rest: Any) -> None:
        """Run a part of saving in all processes; if it fails in one, it fails in all."""
        problem = None
        try:
            part(aside, final, *rest)
        except _UNWRITABLE as error:
            problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        problems = [one for one in gather_object([problem]) if one]
        if not problems:
            return
        if self._accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        kept = self._all()
        mend = f"{kept[0]} is intact: go on from it with --resume." if kept else "Start again after that."
        raise CheckpointError(f"{final.name} could not be saved: {problems[0]} Mend that. {mend}")

    def exists(self) -> bool:
        """Whether there is any complete checkpoint."""
        return bool(self._all())

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all intact; None if there are no checkpoints.

        Removes what interrupted saves left, and warns of damaged checkpoints that it passes over.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.

        """
        found: list[Any] = [None, None]
        if self._accelerator.is_main_process:
            for left in self._folder.glob(f"{_INCOMPLETE}*"):
                shutil.rmtree(left)
            problems = []
            for path in self._all():
                try:
                    verify(path)
                except CheckpointError as error:
                    problems.append(str(error))
                    continue
                found[0] = path
                for problem in problems:
                    warnings.warn(f"{problem} Continuing from the earlier {path.name}.", stacklevel=2)
                break
            else:
                found[1] = " ".join(problems)
        broadcast_object_list(found)
        if found[1]:
            raise CheckpointError(f"no checkpoint is intact. {found[1]}")
        return found[0]

    def load(self, path: Path) -> Progress:
        """Put a checkpoint into the prepared model, optimizer and random states; returns its progress.

        Raises:
            CheckpointError: its weights lie otherwise than those of this run.

        """
        state = read_state(path)
        _check_layout(path, state, self._accelerator)
        self._accelerator.load_state(str(path))
        streams = {
            v: StreamState(**json.loads((path / _stream_file(v)).read_text(encoding="utf-8")))
            for v in range(state["recipe"]["data_streams"])
        }
        return Progress(**{name: state[name] for name in _COUNTED}, streams=streams)

    def _all(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return sorted((p for p in self._folder.glob("step-*") if p.is_dir()), reverse=True)


def _check_layout(path: Path, state: dict[str, Any], accelerator: Accelerator) -> None:
    written, own = state["layout"], layout(accelerator)
    names = {
        "whole": "by processes that hold the whole model",
        "FSDP": "under FSDP",
        "DEEPSPEED": "by DeepSpeed",
    }
    if written != own:
        raise CheckpointError(
            f"{path} was written {names[written]}, and this run goes on {names[own]}: start it with the "
            "config of accelerate that it began with, or a new run in another output_dir."
        )
    if own == "DEEPSPEED" and state["processes"] != accelerator.num_processes:
        raise CheckpointError(
            f"{path} holds the pieces of {state['processes']} processes of DeepSpeed, and this run has "
            f"{accelerator.num_processes}: go on with as many as before."
        )


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint: the recipe, and what :class:`Progress` counts."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest is missing or of another format, or a file is missing or damaged.

    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read ({error}).") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version!r}; this code reads {FORMAT_VERSION}.")
    for entry in files:
        file = path / entry["name"]
        if not file.is_file():
            raise CheckpointError(f"{path}: {entry['name']} is missing.")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path}: {entry['name']} has {file.stat().st_size} bytes instead of {entry['bytes']}."
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{path}: {entry['name']} is damaged (its SHA-256 differs).")


@contextmanager
def written_whole(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Two names for a folder that appears at once: the first to write into, and the one that it gets then.

    Raises:
        CheckpointError: it could not be written, as on a full disk. What there was is as it was.

    """
    aside = folder.with_name(f"{_INCOMPLETE}{folder.name}")
    try:
        yield aside, folder
        for file in aside.rglob("*"):
            _sync(file)
        _sync(aside)
        if folder.exists():
            _discard(folder)
        os.rename(aside, folder)
        _sync(folder.parent)
    except Exception as error:
        # Tokenizers tell of a full disk by an Exception of no kind.
        if not isinstance(error, _UNWRITABLE) and type(error) is not Exception:
            raise
        shutil.rmtree(aside, ignore_errors=True)  # it may be what fills the disk
        raise CheckpointError(
            f"{folder} could not be saved: {type(error).__name__}: {error} Mend that. The checkpoint of the "
            "last update has it all: the same command with --resume writes it."
        ) from error


def _bare_weights(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """Save names without the wrapper of data parallelism, so that any number of processes can load them.

    Of tied weights one is kept, as safetensors requires; loading fills the others.
    """
    for state in weights:
        seen = set()
        for name, value in list(state.items()):
            key = (value.device, value.data_ptr(), value.shape, value.stride())
            if key in seen and value.numel():
                del state[name]
            seen.add(key)
        for name in list(state):
            state[_bare_name(name)] = state.pop(name)


def _bare_name(name: str) -> str:
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def _load_bare_weights(models: list[nn.Module], folder: str) -> None:
    file = Path(folder) / _WEIGHTS
    if file.exists():  # otherwise accelerate saved shards and loads them itself
        for model in models:
            load_model(extract_model_from_parallel(model, keep_torch_compile=False), file)
        models.clear()


def _stream_file(stream: int) -> str:
    return f"stream-{stream:04d}.json"


def _discard(folder: Path) -> None:
    # Renamed first: a crash while deleting must not leave half a checkpoint under a valid name.
    doomed = folder.with_name(f"{_INCOMPLETE}discarded-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = [
        {"name": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in files
    ]
    _write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, "files": entries})
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
