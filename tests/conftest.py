"""Fixtures shared by all tests: tiny stock models and, where it is at hand, real input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import triton_ops
from triton_ops import storage

# The models here are tiny: a second thread costs more than it gives, and much more on a busy machine.
torch.set_num_threads(1)

# For runs that repeat tests of the suite under other conditions.
settings.register_profile("few", max_examples=30)

ASSETS = Path(
    os.environ.get("HF_SPARSE_TEST_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)


def pytest_report_header() -> str:
    found = "found" if ASSETS.is_dir() else "NOT found: tests on the real Llama and C4 will be skipped"
    return f"real inputs (HF_SPARSE_TEST_ASSETS, default ../shared/assets): {found}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled kernels are shared with the user; what tests measure is not, in either direction."""
    compiled = storage.cache_dir() / "cpu"
    compiled.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("cache")
    (folder / "cpu").symlink_to(compiled.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(storage.ENVIRONMENT, str(folder))
        triton_ops.forget()
        yield folder


@pytest.fixture(autouse=True)
def _no_measurement_of_other_tests(_cache_of_the_suite: Path) -> Iterator[None]:
    """Of times of tiny blocks on a busy machine, any may say that dense is faster."""
    yield
    measured = _cache_of_the_suite / "break_even.json"
    if measured.exists():
        measured.unlink()
        triton_ops.forget()


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty HF_SPARSE_CACHE; what this process knows of its machine is forgotten, before and after."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_SPARSE_CACHE", str(folder))
    monkeypatch.delenv("HF_SPARSE_BACKEND", raising=False)
    triton_ops.forget()
    yield folder
    triton_ops.forget()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real 260K-parameter Llama and real C4 documents."""
    if not ASSETS.is_dir():
        pytest.skip("real inputs are not at hand; set HF_SPARSE_TEST_ASSETS")
    return ASSETS
