"""Points of a law: tokens trained on and the activation ratio then, out of logs and tables of results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Point = tuple[float, float]
"""Tokens, and activation ratio."""
Kind = Literal["eval", "train"]


def law_points(run: Any, *, kind: Kind = "eval", where: Mapping[str, Any] | None = None) -> list[Point]:
    """The points of one run: tokens trained on, and the activation ratio (one minus sparsity) then.

    What was before the first token is left out: the laws are of tokens above 0.

    Args:
        run: the output folder of a run of the trainer, or its ``log.jsonl``; or a ``.json`` with ``runs``, as
            in ``docs/results``; or pairs of tokens and activation ratio.
        kind: records of a log to take: ``"eval"``, on held-out text, or ``"train"``, on the batches.
        where: of a ``.json``, the fields of the runs to take, such as ``{"variant": "relu"}``.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no points; tokens below 0, or a ratio outside of 0 to 1.

    """
    if kind not in ("eval", "train"):
        raise ValueError(f"kind={kind!r} is not known; use 'eval' or 'train'.")
    if not isinstance(run, str | os.PathLike):
        return [_point(pair) for pair in _pairs(run)]
    path = Path(run)
    if path.is_dir():
        path = path / "log.jsonl"
        if not path.is_file():
            raise ValueError(f"{run} has no log.jsonl; give the output folder of a run of the trainer.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return _of_results(text, where or {})
        if where:
            raise ValueError(f"where={dict(where)} is of tables of results (.json); a log is of one run.")
        return _of_log(text, kind)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        lacks = f"a record lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {lacks}") from None


def _of_log(text: str, kind: Kind) -> list[Point]:
    records = _records(text)
    per_step = _tokens_per_step(records)
    # The "tokens" of an evaluation are those it was over; those trained on are known from the step.
    points = [
        _point((record["step"] * per_step, 1 - _sparsity(record)))
        for record in records
        if record["kind"] == kind and record["step"] > 0 and (kind == "eval" or "sparsity" in record)
    ]
    if not points:
        raise ValueError(f"it has no records of the kind {kind!r} after step 0.")
    return points


def _tokens_per_step(records: list[dict[str, Any]]) -> float:
    """Every update of a run of the trainer is of the same number of tokens.

    Raises:
        ValueError: it is not known, or not so.

    """
    found = {record["tokens"] / record["step"] for record in records if record["kind"] == "train"}
    if not found:
        raise ValueError("it has no records of the kind 'train', which say how many tokens a step is.")
    if max(found) - min(found) > 1e-9 * max(found) or min(found) <= 0:
        raise ValueError(
            f"its steps are of {min(found):,.1f} to {max(found):,.1f} tokens, and not of one number: the "
            "tokens at an evaluation are not known. Give pairs of tokens and activation ratio."
        )
    return max(found)


def _records(text: str) -> list[dict[str, Any]]:
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # cut short by a crash
                break
            raise ValueError(f"line {number} is no JSON.") from None
        if not isinstance(record, dict) or "kind" not in record or type(record.get("step")) is not int:
            raise ValueError(f"line {number} is no record of a log, with a kind and a step.")
        records.append(record)
    return records


def _of_results(text: str, where: Mapping[str, Any]) -> list[Point]:
    found = json.loads(text)
    runs = [run for run in found["runs"] if all(run.get(name) == value for name, value in where.items())]
    if not runs:
        raise ValueError(f"it has no run with {dict(where)}.")
    if not where and len(runs) > 1:
        kinds = sorted({str(run.get("variant", run.get("name"))) for run in runs})
        raise ValueError(
            f"it holds {len(runs)} runs ({', '.join(kinds)}), which need not follow one law; say which with "
            'where, such as {"variant": ...}.'
        )
    points = []
    for run in runs:
        fields = found.get("fields") or run["recipe"]
        per_step = fields["global_batch"] * fields["sequence_length"]
        rows = run["evaluations"]
        points += [_point((row["step"] * per_step, 1 - _sparsity(row))) for row in rows if row["step"] > 0]
    return points


def _sparsity(record: Mapping[str, Any]) -> float:
    value = record["sparsity"] if "sparsity" in record or "density" not in record else 1 - record["density"]
    if not isinstance(value, int | float):
        raise ValueError(f"the sparsity at step {record['step']} is {value!r}.")
    return float(value)


def _pairs(run: Any) -> Iterable[Any]:
    if not isinstance(run, Iterable):
        raise ValueError(f"a run is a path, or pairs of tokens and activation ratio, and not {run!r}.")
    return run


def _point(pair: Any) -> Point:
    try:
        tokens, ratio = map(float, pair)
    except (TypeError, ValueError):
        raise ValueError(f"{pair!r} is no pair of tokens and activation ratio.") from None
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens={tokens:g} is no positive number of training tokens.")
    if not 0 <= ratio <= 1:
        raise ValueError(f"the activation ratio {ratio:g} at tokens={tokens:g} is not in 0 to 1.")
    return tokens, ratio
