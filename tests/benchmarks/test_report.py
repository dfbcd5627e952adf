"""docs/benchmarks.md says what benchmarks/results says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "report.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The scripts, results and page, where a test may change them."""
    for folder in ("benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_page_is_current() -> None:
    done = report(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_other_results_make_another_page(copied: Path) -> None:
    results, page = copied / "benchmarks/results/generate.json", copied / "docs/benchmarks.md"
    results.write_text(results.read_text().replace('"tokens_per_s": 11.44', '"tokens_per_s": 987.65'))
    stale = report(copied, "--check")
    assert stale.returncode == 1
    assert "python benchmarks/report.py" in stale.stderr
    assert "987.65" not in page.read_text()
    assert report(copied).returncode == 0
    assert "987.65" in page.read_text()
    assert report(copied, "--check").returncode == 0


def test_no_result_is_forgotten(copied: Path) -> None:
    results = copied / "benchmarks/results"
    shutil.copy(results / "generate.json", results / "new.json")
    done = report(copied, "--check")
    assert done.returncode == 1
    assert "new.json in no section" in done.stderr
    (results / "new.json").unlink()
    (results / "generate.json").unlink()
    assert "generate.json is missing" in report(copied).stderr
