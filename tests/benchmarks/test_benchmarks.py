"""Every benchmark runs end to end at a tiny size, writes what it promises, and times no wrong result."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from support.runs import sentences, write_jsonl

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# fmt: off
CONDITIONS = {
    "command", "date", "device", "cpu", "gpu", "cores", "threads", "load_before", "torch", "triton",
    "transformers",
}
ROW = {
    "shape", "dtype", "layers_cycled", "cycled_mib", "tokens", "sparsity", "backend", "dense", "sparse",
    "speedup", "speedup_quartiles", "byte_limit", "limit_share", "gb_per_s", "read_gb_per_s",
    "bandwidth_share",
}
# fmt: on
MLP = ("--layers", "2", "--dtypes", "bfloat16")
TORCH = (*MLP, "--backends", "torch")


def run(script: str, out: Path, *options: str, device: str = "cpu", process: bool = False) -> dict[str, Any]:
    """Run a benchmark as a user does, or as good as that in this process; returns what it wrote."""
    command = [str(BENCHMARKS / f"{script}.py"), "--device", device, "--threads", "1", "--repeats", "2"]
    command += ["--out", str(out), *options]
    if process:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.syspath_prepend(BENCHMARKS)
            runpy.run_path(command[0], run_name="__main__")
        for name in ("blocks", "finetuned", "generate", "harness", "peers", "plots"):
            sys.modules.pop(name, None)  # each run imports its own, which knows its name
    written = json.loads(out.read_text())
    assert written["benchmark"] == script
    assert written["provenance"].keys() >= CONDITIONS
    assert written["provenance"]["command"].startswith(f"python benchmarks/{script}.py")
    assert str(out.parent) not in out.read_text()
    assert written["results"]
    return written


@pytest.fixture
def harness() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_harness", BENCHMARKS / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_mlp_decode(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shapes = ("--shapes", "64x96", "64x96-plain", "--sparsity", "0", "90")
    rows = run("mlp_decode", tmp_path / "r.json", *TORCH, *shapes, "--plot", process=True)["results"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["shape"], row["gated"]) for row in rows[::2]] == [("64x96", True), ("64x96-plain", False)]
    for row in rows:
        assert row.keys() >= ROW
        density, matrices = 1 - row["sparsity"], 2 if row["gated"] else 1
        assert row["byte_limit"] == pytest.approx((matrices + 1) / (1 + matrices * density), abs=2e-3)
    assert [round(row["sparsity"], 1) for row in rows] == [0, 0.9] * 2


def test_mlp_batch(tmp_path: Path) -> None:
    sizes = ("--shapes", "64x512", "--tokens", "1", "8", "--union", "8:30")
    rows = run("mlp_batch", tmp_path / "r.json", *TORCH, *sizes)["results"]
    assert all(row.keys() >= ROW | {"inputs", "correlation", "union"} for row in rows)
    assert [(row["inputs"], row["tokens"]) for row in rows] == [
        ("independent", 1),
        ("independent", 8),
        ("correlated 8:30", 1),
        ("correlated 8:30", 8),
    ]
    assert rows[1]["union"] == pytest.approx(0.57, abs=0.05)
    assert rows[3]["union"] == pytest.approx(0.30, abs=0.08)


def test_mlp_certified(tmp_path: Path) -> None:
    sizes = ("--shapes", "64x512", "--sparsity", "90")
    plain, certified = run("mlp_certified", tmp_path / "r.json", *TORCH, *sizes)["results"]
    assert (plain["certified"], certified["certified"]) == (False, True)
    assert certified.keys() >= ROW | {"surviving"}
    assert 1 - certified["sparsity"] <= certified["surviving"] < 0.5
    density, surviving = 1 - certified["sparsity"], certified["surviving"]
    assert certified["byte_limit"] == pytest.approx(3 / (0.5 + surviving + 2 * density), abs=2e-3)


def test_mlp_certified_on_the_weights_of_a_model(tmp_path: Path, assets: Path) -> None:
    sizes = ("--weights", str(assets / "stories260K"), "--sparsity", "90")
    rows = run("mlp_certified", tmp_path / "r.json", *TORCH, *sizes)["results"]
    assert {row["shape"] for row in rows} == {"stories260K"}


def test_linear(tmp_path: Path) -> None:
    sizes = ("--shapes", "64x96", "--tokens", "1", "8", "--layouts", "rows", "columns", "--cold-mib", "1")
    rows = run("linear", tmp_path / "r.json", "--dtypes", "bfloat16", *sizes, "--backend", "torch")["results"]
    assert [(row["layout"], row["tokens"]) for row in rows] == [
        ("rows", 1),
        ("rows", 8),
        ("columns", 1),
        ("columns", 8),
    ]
    for row in rows:
        assert row["weights_cycled"] * 64 * 96 * 2 >= 1 << 20
        assert row["gb_per_s"] == pytest.approx(64 * 96 * 2 / row["linear"]["median_ms"] / 1e6, abs=0.1)


@pytest.mark.slow
def test_generate(tmp_path: Path) -> None:
    sizes = ("--shape", "128x192", "--vocab", "256", "--layers", "2", "--new-tokens", "3", "--batch", "2")
    options = ("--dtype", "float32", "--backend", "torch", "--certify")
    rows = {row["model"]: row for row in run("generate", tmp_path / "r.json", *sizes, *options)["results"]}
    assert list(rows) == ["patched, dense", "stock SiLU", "patched, sparse", "patched, certified"]
    assert rows["patched, certified"]["same_tokens_as_uncertified"]
    for name in ("patched, sparse", "patched, certified"):
        assert rows[name]["same_greedy_tokens_as_dense"] == [3, 3]
        assert rows[name]["batch"] == 2
        assert 0.8 < rows[name]["sparsity"] < 1


def test_finetuned(tmp_path: Path, assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    hf_sparse.patch(model, "relu")
    sparse = tmp_path / "relu-0" / "final"
    model.save_pretrained(sparse)
    given = (str(sparse), f"again={sparse}")
    options = ("--dense", str(assets / "stories260K"), "--sparse", *given, "--new-tokens", "3")
    rows = run("finetuned", tmp_path / "r.json", *options, "--dataset", str(assets / "c4"))["results"]
    ways = [f"{name}, {way}" for name in ("relu-0", "again") for way in ("run dense", "skipping")]
    assert [row["model"] for row in rows] == ["dense", *ways]
    assert [row["sparsity"] > 0.3 for row in rows] == [False, *[True] * 4]
    assert rows[0]["speedup"] == 1


def test_several_tokens(tmp_path: Path, assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path / "sparse")
    options = ("--dense", str(assets / "stories260K"), "--sparse", str(tmp_path / "sparse"))
    options += ("--dataset", str(assets / "c4"), "--batches", "1", "2", "--drafts", "3")
    sizes = ("--new-tokens", "6", "--prompt-tokens", "12")
    rows = run("several_tokens", tmp_path / "r.json", *options, *sizes)["results"]
    uses = [(1, 0), (2, 0), (1, 3)]
    assert [(row["batch"], row["draft"]) for row in rows] == [use for use in uses for _ in range(2)]
    assert [row["tokens_per_step"] for row in rows[:4]] == [1.0] * 4
    assert all(row["tokens_per_step"] >= 1 for row in rows)


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    sizes = ("--shape", "128x4096", "--vocab", "256", "--layers", "2", "--new-tokens", "34")
    rows = run("step", tmp_path / "r.json", *sizes)["results"]
    # MLPs, and in the prepared ones attention; other layers are too small for a kernel.
    assert [row["calls"] for row in rows] == [2, 4, 4, 4]
    for row in rows:
        assert 0 < row["kernels"]["median_ms"] < row["step"]["median_ms"]


@pytest.mark.slow
def test_untrained(tmp_path: Path) -> None:
    rows = run("untrained", tmp_path / "r.json", "--tokens", "2048")["results"]
    found = {row["patch"]: row for row in rows}
    assert found["as it is"]["sparsity"] == 0
    assert found["top-k 0.1"]["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert found["CATS 0.7"]["sparsity"] == pytest.approx(0.7, abs=0.05)
    assert min(rows, key=lambda row: row["perplexity"])["patch"] == "as it is"


def test_calibration(tmp_path: Path, assets: Path) -> None:
    sizes = ("--levels", "0.4", "--tokens", "512", "--calibration-tokens", "512", "--sequence-length", "64")
    options = ("--model", str(assets / "stories260K"), "--dataset", str(assets / "c4"))
    dense, *rows = run("calibration", tmp_path / "r.json", *options, *sizes)["results"]
    assert [row["method"] for row in rows] == ["teal", "wina", "scap", "cats"]
    assert all(row["sparsity"] == pytest.approx(0.4, abs=0.006) for row in rows)
    assert all(row["perplexity"] > dense["perplexity"] for row in rows)


@pytest.mark.slow
def test_training_step(tmp_path: Path) -> None:
    names = ["transformers.Trainer, ReLU and L1", "finetune.py, ReLU and L1"]
    for name, seed in (("train", 0), ("validation", 1)):
        write_jsonl(tmp_path / "text" / f"{name}.jsonl", sentences(40, seed))
    sizes = ("--model", str(TINY_MODEL), "--text", str(tmp_path / "text"))
    sizes += ("--batch", "4", "--micro-batch", "2", "--length", "16")
    first, ours = run("training_step", tmp_path / "r.json", *sizes, "--competitors", *names)["results"]
    assert [first["trainer"], ours["trainer"]] == names
    assert ours["loss_after_one_update"] == pytest.approx(first["loss_after_one_update"], rel=1e-5)
    assert first["share_of_the_first"] == first["memory_share_of_the_first"] == 1
    assert ours["share_quartiles"][0] <= ours["share_of_the_first"] <= ours["share_quartiles"][1]
    assert 100 < ours["peak_mib"] == ours["memory_share_of_the_first"] * first["peak_mib"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("script", ["mlp_decode", "mlp_batch", "mlp_certified"])
def test_on_a_gpu(tmp_path: Path, script: str) -> None:
    written = run(script, tmp_path / "r.json", *MLP, "--shapes", "256x512", "--sparsity", "90", device="cuda")
    assert written["provenance"]["gpu"]
    assert {row["backend"] for row in written["results"]} == {"triton"}


def test_the_gate_refuses_a_wrong_result(harness: Any) -> None:
    exact = torch.randn(1, 64, dtype=torch.float64)
    dense = exact.float()
    harness.check(dense.clone(), dense, exact, "right")
    wrong = dense.clone()
    wrong[0, 3] += 1e-3
    with pytest.raises(SystemExit, match="wrong result, no timing: off by a bit"):
        harness.check(wrong, dense, exact, "off by a bit")
    wrong[0, 3] = float("nan")
    with pytest.raises(SystemExit, match="wrong result"):
        harness.check(wrong, dense, exact, "nan")
    with pytest.raises(SystemExit, match="not identical"):
        harness.check_equal(dense + 1e-6, dense, "other bits")


def test_competitors_take_turns_and_the_ratio_is_of_one_turn(harness: Any) -> None:
    order: list[str] = []

    class Fixed:
        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.left = name, iter(seconds)

        def seconds(self) -> float:
            order.append(self.name)
            return next(self.left)

    # The first turn warms up; in the last the machine was busy for both.
    runs = {"dense": Fixed("dense", [9, 2, 2, 20]), "sparse": Fixed("sparse", [9, 1, 1, 10])}
    times, ratios = harness.interleaved(runs, 3)
    assert order == ["dense", "sparse"] * 4
    assert times["dense"].median_ms == 2000
    assert (ratios["sparse"].low, ratios["sparse"].median, ratios["sparse"].high) == (2, 2, 2)


def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = (
        "--shape",
        "64x96",
        "--layers",
        "2",
        "--dtypes",
        "bfloat16",
        "--rank",
        "4",
        "--sparsity",
        "0",
        "90",
    )
    with hf_sparse.backend("torch"):  # too small to skip by itself
        rows = run("lora", tmp_path / "r.json", *sizes)["results"]
    found = [(row["adapter"], round(row["sparsity"], 1), row["skips"]) for row in rows]
    places = ("merged", "gate", "up", "down")
    assert found == [(where, silent, where != "down") for where in places for silent in (0, 0.9)]


def test_trained_mlp(tmp_path: Path) -> None:
    sizes = ("--shapes", "64x96", "--tokens", "200", "--dtypes", "float32", "--sparsity", "0", "95")
    dense, sparse = run("trained_mlp", tmp_path / "r.json", *sizes)["results"]
    assert (round(dense["sparsity"], 2), round(sparse["sparsity"], 2)) == (0, 0.95)
    assert sparse["skipping_kept_mib"] < 0.2 * sparse["dense_kept_mib"]


def test_experts(tmp_path: Path) -> None:
    sizes = (
        "--shape",
        "64x128",
        "--experts",
        "8",
        "--top-k",
        "2",
        "--tokens",
        "1",
        "5",
        "--dtypes",
        "float32",
    )
    with hf_sparse.backend("torch"):  # such small ones run dense by themselves
        rows = run("experts", tmp_path / "r.json", *sizes, "--sparsity", "90")["results"]
    assert [row["tokens"] for row in rows] == [1, 5]
    assert all(row["sparsity"] == pytest.approx(0.9, abs=0.05) for row in rows)
    assert all(row["speedup"]["median"] > 0 for row in rows)
