"""What the comparison from scratch makes of its runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "from_scratch.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_from_scratch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec.loader.exec_module(module)
    return module


def evaluation(step: int, loss: float, density: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "density": density}


def test_the_density_at_a_loss_is_that_of_its_first_crossing(script):
    run = [evaluation(0, 8.0, 0.5), evaluation(1, 6.0, 0.4), evaluation(2, 7.0, 0.3), evaluation(3, 5.0, 0.2)]
    assert script.at_loss(run, 6.5) == pytest.approx(0.425)
    assert script.at_loss(run, 6.0) == pytest.approx(0.4)
    assert script.at_loss(run, 5.5) == pytest.approx(0.225)
    with pytest.raises(ValueError, match=r"loss of 4\.0"):
        script.at_loss(run, 4.0)


def test_a_run_is_told_from_its_log(script):
    records: list[dict[str, Any]] = [{"kind": "run", "parameters": 7}]
    records += [{"kind": "train", "sparsity": 0.05 * n} for n in range(20)]
    records += [{"kind": "eval", "step": 9, "loss": 3.0, "sparsity": 0.9}]
    told = script.told(records)
    assert told["training_density"] == pytest.approx(1 - 0.05 * 9.5)
    assert told["training_density_end"] == pytest.approx(1 - 0.05 * 18.5)
    assert told["evaluations"] == [evaluation(9, 3.0, pytest.approx(0.1))]


def test_the_table_compares_at_the_loss_that_all_have_reached(script):
    def run(variant: str, loss: float, density: float, training: float) -> dict[str, Any]:
        evaluations = [evaluation(0, 8.0, 0.5), evaluation(1, loss, density)]
        own = {"training_density": training, "training_density_end": training / 2}
        return {"model": "t5", "variant": variant, "seed": 0, "evaluations": evaluations, **own}

    runs = [run(name, 4.0, 0.4, 0.6) for name in script.VARIANTS]
    runs[-1] = run("all three", 2.0, 0.2, 0.3)
    first, *_, last = script.table(runs).splitlines()[2:]
    assert first == "| t5 | vanilla | 4.000 | 40.0% | 40.0% | 60.0% | 30.0% | +0%, +0%, +0% |"
    # At a loss of 4: two thirds of the way from 8 to 2, so of 0.5 to 0.2.
    assert last == "| t5 | all three | 2.000 | 20.0% | 30.0% | 30.0% | 15.0% | +50%, +25%, +50% |"
