"""The metadata at the top of a README: ours beside those of the user, which stay as they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCardData

from hf_sparse.activations.config import ACTIVATIONS

BY_US = " (hf_sparse.measure)"
"""Ends the names of the results that we write, so that they can be told from those of others."""

TAGS = ("hf_sparse", "activation-sparsity")

_FRONT = re.compile(
    r"\A(\ufeff?\s*---[ \t]*(\r\n|\r|\n))(.*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z))", re.DOTALL
)
_EMPTY = re.compile(r"\A\ufeff?\s*---[ \t]*(\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_KEY = re.compile(r"^(?![\s#-])[^\r\n:]+:(?=[ \t\r\n]|\Z)", re.MULTILINE)
_INDEX = "model-index"


def with_metadata(readme: str, ours: ModelCardData, *, given: Sequence[str] = ()) -> str:
    """``readme`` with ``ours`` in its metadata.

    What the user has there stays: other keys, tags and results are kept, and of keys that both have, only
    those named in ``given``, and ``tags`` and results, change. Tags of activations that the model does not
    have any more, and results of ours, go.

    Raises:
        ValueError: the metadata that are there cannot be read.

    """
    old = read(readme)
    new = {name: value for name, value in ours.to_dict().items() if name not in old or name in given}
    new["tags"] = _tags(old, ours.tags or [])
    new[_INDEX] = _index(old, ours.to_dict().get(_INDEX, []))
    return _edited(readme, old, new)


def without_metadata(readme: str) -> str:
    """``readme`` without our results, and without the tags that say what the model is.

    Raises:
        ValueError: as of :func:`with_metadata`.

    """
    old = read(readme)
    tags = [tag for tag in _tags(old, []) if tag not in TAGS[1:]]
    return _edited(readme, old, {"tags": tags, _INDEX: _index(old, [])})


def read(readme: str) -> dict[str, Any]:
    """The metadata of a README; empty if it has none.

    Raises:
        ValueError: they cannot be read.

    """
    found = _FRONT.search(readme)
    if found is None or _EMPTY.search(readme):
        return {}
    try:
        values = yaml.safe_load(found[3])
    except yaml.YAMLError as error:
        raise ValueError(
            f"the metadata at the top of README.md are no YAML; mend them there: {error}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"the metadata at the top of README.md are no mapping, but {type(values).__name__}.")
    return values


def _tags(old: Mapping[str, Any], ours: Sequence[str]) -> list[str]:
    tags = old.get("tags") or []
    if isinstance(tags, str):
        tags = [tags]
    if not isinstance(tags, list):
        raise ValueError(f"tags={tags!r} in the metadata of README.md is no list; mend it there.")
    return [
        *(tag for tag in tags if tag in ours or tag not in ACTIVATIONS),
        *(t for t in ours if t not in tags),
    ]


def _index(old: Mapping[str, Any], ours: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The evaluation results: those of others, and ours with the first model, as readers of it expect."""
    entries = []
    try:
        for entry in old.get(_INDEX) or []:
            results = [
                {**result, "metrics": kept}
                for result in entry["results"]
                if (kept := [m for m in result["metrics"] if not str(m.get("name")).endswith(BY_US)])
            ]
            if results:
                entries.append({**entry, "results": results})
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{_INDEX} in the metadata of README.md is not of the Hub's form, a list of {{name, results}}; "
            "mend it there."
        ) from None
    if ours and entries:
        entries[0]["results"] += ours[0]["results"]
        return entries
    return entries or ours or None


def _edited(readme: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """``readme`` with some keys set to other values, or taken out where that is None or empty."""
    changes = {k: v for k, v in new.items() if (v or None) != (old.get(k) or None)}
    if not changes:
        return readme
    wanted = {k: v for k, v in {**old, **changes}.items() if k not in changes or v}
    found = None if _EMPTY.search(readme) else _FRONT.search(readme)
    if found is None:
        body = _EMPTY.sub("", readme).removeprefix("\ufeff")
        return f"---\n{_yaml(wanted)}\n---\n{body}" if wanted else readme
    line_end, text = found[2], found[3]
    # Key by key, so that the order, the comments and the style of the others stay.
    starts = [match.start() for match in _KEY.finditer(text)]
    pieces = [text[i:j] for i, j in zip([0, *starts], [*starts, len(text)], strict=True)]
    kept = []
    for piece in pieces:
        key = piece.partition(":")[0].strip("\"'")
        if key not in changes:
            kept.append(piece.rstrip("\r\n"))
        elif value := changes.pop(key):
            kept.append(_yaml({key: value}, line_end))
    kept += [_yaml({key: value}, line_end) for key, value in changes.items() if value]
    result = line_end.join(piece for piece in kept if piece)
    try:
        right = yaml.safe_load(result) == wanted
    except yaml.YAMLError:
        right = False
    if not right:  # written in a way that has no lines of its own for a key
        result = _yaml(wanted, line_end)
    return f"{found[1]}{result}{found[4]}{readme[found.end() :]}"


def _yaml(values: Mapping[str, Any], line_end: str = "\n") -> str:
    return CardData(**values).to_yaml(line_break=line_end)
