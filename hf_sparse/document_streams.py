"""Data sets of the Hub: what they are made of, and what of them only ``datasets`` can read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from hf_sparse.document_files import Files, GetState, Row, State, format_of, found_in

_KINDS = {"JsonConfig": "json", "ParquetConfig": "parquet", "TextConfig": "text"}


class Streamed:
    """A data set of the Hub in any format, streamed by ``datasets``."""

    def __init__(self, name: str, config: str | None, revision: str | None, field: str) -> None:
        self._name, self._config, self._revision, self._field = name, config, revision, field
        self._opened: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # For another process, which opens it anew.
        return {**vars(self), "_opened": {}}

    @cached_property
    def splits(self) -> list[str]:
        """Their names."""
        from datasets import get_dataset_split_names

        return list(get_dataset_split_names(self._name, self._config, revision=self._revision))

    def as_files(self, unit: str) -> Files | None:
        """The data set as plain files at the commit that it now has; None if it is of another kind."""
        from datasets import load_dataset_builder

        config = load_dataset_builder(self._name, self._config, revision=self._revision).config
        kind = _KINDS.get(type(config).__name__)
        splits = {str(split): list(map(str, files)) for split, files in (config.data_files or {}).items()}
        formats = {format_of(file) for files in splits.values() for file in files}
        options = (getattr(config, name, None) for name in ("field", "filters"))
        plain = not any(options) and getattr(config, "encoding", "utf-8") == "utf-8"
        return Files(kind, splits, self._field, unit) if kind and plain and formats == {kind} else None

    def rows(self, split: str, state: State | None, part: int, parts: int) -> Iterator[tuple[Row, GetState]]:
        """As :meth:`hf_sparse.document_files.Files.rows`."""
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node

        if split not in self._opened:
            self._opened[split] = load_dataset(
                self._name, self._config, revision=self._revision, split=split, streaming=True
            )
        # A fresh object for each pass: a data set that was given a state starts from it every time.
        data = split_dataset_by_node(self._opened[split], rank=part, world_size=parts)
        if state is not None:
            data.load_state_dict(state)
        for row in data:
            found = found_in(row, self._field, "")
            if found.problem is not None:
                found = found._replace(place=f"{self._name}, {_place(data.state_dict())}")
            yield found, data.state_dict


def _place(state: State) -> str:
    """Where a data set stands, as its state has it: the row that was read last."""
    inner = state
    while "shard_idx" not in inner and (below := [v for v in inner.values() if isinstance(v, dict)]):
        inner = below[0]
    return f"row {inner.get('shard_example_idx', '?')} of file {inner.get('shard_idx', 0) + 1}"
