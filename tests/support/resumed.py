"""Whether a run that was interrupted ended as one that was not."""

from __future__ import annotations

from pathlib import Path

from run_log import read_log


def same_result(a: Path, b: Path) -> None:
    """The same bits of weights and config, and the same log but for speeds."""
    assert (a / "final/model.safetensors").read_bytes() == (b / "final/model.safetensors").read_bytes()
    assert (a / "final/config.json").read_bytes() == (b / "final/config.json").read_bytes()
    logs = []
    for output in (a, b):
        records = read_log(output / "log.jsonl")
        assert records.pop(0)["kind"] == "run"
        for record in records:
            for name in ("tokens_per_second", "data_wait"):
                record.pop(name, None)
        logs.append(records)
    assert logs[0] == logs[1]
