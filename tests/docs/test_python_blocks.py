"""Every Python block of the documentation runs, page by page, on tiny models from a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from hf_sparse.assets import TINY_MODEL
from support.loopback_hub import LoopbackHub
from support.page_blocks import blocks
from triton_ops.storage import cache_dir

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if blocks(path.read_text(encoding="utf-8"))
]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _tiny_opt(folder: Path) -> dict[str, bytes]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, model_input_names=["input_ids", "attention_mask"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_attention_heads": 4}
    model = OPTForCausalLM(
        OPTConfig(**sizes, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=128)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _files(folder)


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str | None]:
    """What went wrong on each page; all are run by one process."""
    home = tmp_path_factory.mktemp("home")
    built = cache_dir() / "cpu"  # the compiled kernel, which is not what is tested here
    if built.is_dir():
        shutil.copytree(built, home / "cache" / "cpu")
    with LoopbackHub() as hub:
        hub.repositories["facebook/opt-6.7b"] = _tiny_opt(home / "opt")
        hub.repositories["meta-llama/Llama-3.2-1B"] = _files(TINY_MODEL)
        environment = {
            **os.environ,
            **hub.environment(home / "hf"),
            "HF_SPARSE_CACHE": str(home / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "MPLBACKEND": "agg",
        }
        ran = subprocess.run(
            [sys.executable, "-m", "support.page_blocks", *(str(ROOT / page) for page in PAGES)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            cwd=home,
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    return {Path(page).relative_to(ROOT).as_posix(): fault for page, fault in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page, faults):
    assert faults[page] is None, faults[page]


def test_few_blocks_are_not_run_and_each_says_why():
    left = [
        (page, block.not_run)
        for page in PAGES
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
        if block.not_run
    ]
    assert len(left) <= 3
    assert all(len(reason.split()) >= 5 for _, reason in left)


def test_a_page_is_run_as_it_is_read():
    page = "\n".join(
        [
            "<!-- run first:",
            "x = 2",
            "-->",
            "",
            "1. An item:",
            "",
            "   ```python",
            "   y = x",
            "   if y:",
            "       y += 1",
            "   ```",
            "",
            "<!-- run first:",
            "x = 2",
            "-->",
            "",
            "```python",
            "z = y",
            "```",
            "",
            "<!-- not run: it has to be bought first -->",
            "",
            "```python",
            "buy()",
            "```",
            "",
            "```console",
            "$ python",
            "```",
        ]
    )
    first, second, third = blocks(page)
    assert (first.line, first.code, first.first) == (8, "y = x\nif y:\n    y += 1\n", "")
    assert (second.line, second.code, second.first) == (18, "z = y\n", "x = 2")
    assert (third.code, third.not_run) == ("buy()\n", "it has to be bought first")
