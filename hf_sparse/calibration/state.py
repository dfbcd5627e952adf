"""The config that a model is patched with while a calibration tries others, and what stands after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_sparse.composite import LANGUAGE
from hf_sparse.config import SparsityConfig
from hf_sparse.inputs import named_thresholded
from hf_sparse.modules import sparse_part
from hf_sparse.patching import inspect, patch, unpatch


@contextmanager
def undone_on_failure(base: Any, before: SparsityConfig | None) -> Iterator[None]:
    """In here ``base`` may be patched at will: what fails leaves it with the config ``before``."""
    known = {name: part.density for name, part in _parts(base)}
    try:
        yield
    except BaseException:
        put(base, before)
        raise
    finally:
        for name, part in _parts(base):  # patching again makes them anew
            if part.density is None:
                part.density = known.get(name)


def _parts(base: Any) -> list[tuple[str, Any]]:
    """What keeps a density: patched blocks, and linear layers with thresholds."""
    blocks = [(block.name, sparse_part(block.module)) for block in inspect(base, part=LANGUAGE).blocks]
    return [(name, part) for name, part in blocks if part is not None] + list(named_thresholded(base))


def put(base: Any, config: SparsityConfig | None) -> None:
    """Have ``base`` patched with ``config``, None for the stock model."""
    now = inspect(base, part=LANGUAGE).config
    if config is None:
        if now is not None:
            unpatch(base, part=LANGUAGE)
    elif config != now:
        patch(base, config, part=LANGUAGE)
