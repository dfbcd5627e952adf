"""The programs in docs/training.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_what_the_manual_shows_of_own_loops_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").split("## Your own loop or Trainer")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    weights = [names["model"].lm_head.weight.detach().clone()]
    for block in blocks[1:]:
        exec(block, names)
        weights.append(names["model"].lm_head.weight.detach().clone())
    assert names["trainer"].state.global_step == 4
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not any(module._forward_hooks for module in names["model"].modules())
