"""What goes wrong in a long run: signals, numbers that are not finite, full disks; and runs that go on."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import time

import pytest
from checkpoint import CheckpointError
from run_log import read_log

from hf_sparse.methods import Acting, Method, Term
from support.runs import environment


def records(output, kind):
    return [r for r in read_log(output / "log.jsonl") if r["kind"] == kind]


def weights(output):
    return (output / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_sigterm_saves_and_exits_and_the_run_goes_on_to_the_same_weights(command, in_process, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    fields = {"max_steps": 60, "save_every": 1000, "eval_every": 0, "resume": True, "log_every": 1}
    in_process(command(whole, **fields))
    line = command(output, **fields)
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = output / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(records(output, "train")) >= 3):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 143, printed
    assert "stopped by SIGTERM" in printed
    (saved,) = (output / "checkpoints").iterdir()
    assert saved.name == f"step-{records(output, 'train')[-1]['step']:08d}"
    assert not (output / "final").exists()
    in_process(line)
    assert weights(output) == weights(whole)


class _Breaking(Method):
    """A penalty that is NaN in some updates."""

    name = "breaking"

    def __init__(self, at):
        self.at = at

    def attach(self, training):
        method = self

        class Broken(Acting):
            def loss(self, step, batch, output):
                return {"broken": Term(output.loss * (float("nan") if step in method.at else 0.0))}

        return Broken()


@pytest.fixture
def breaking(monkeypatch):
    def at(*steps):
        import recipe

        monkeypatch.setattr(recipe.Recipe, "acting_methods", lambda self: [_Breaking(steps)])

    return at


def test_updates_that_are_not_finite_are_left_out_and_counted(command, in_process, tmp_path, breaking):
    output = tmp_path / "run"
    breaking(3, 4, 9)
    in_process(command(output, log_every=1, max_skipped=3))
    train = records(output, "train")
    assert [r["skipped_updates"] for r in train] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [r["step"] for r in train if "loss" not in r] == [3, 4, 9]
    assert records(output, "eval")[-1]["loss"] < records(output, "eval")[0]["loss"]


def test_too_many_in_a_row_end_the_run_with_a_diagnosis(command, in_process, tmp_path, breaking):
    breaking(5, 6, 7)
    with pytest.raises(
        FloatingPointError, match=r"broken and gradient_norm not finite in 3 .* step 7.*finite"
    ):
        in_process(command(tmp_path / "run", max_skipped=3))


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(command, in_process, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    fields = {"max_steps": 4, "save_every": 4, "eval_every": 0, "resume": True}
    in_process(command(output, **fields))
    more = {**fields, "extra_steps": 4}
    (saved,) = (output / "checkpoints").iterdir()
    room = (saved / "optimizer.bin").stat().st_size // 2

    def limit():  # a file that grows beyond it cannot be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    line = command(output, **more)
    done = subprocess.run(
        line, env=environment(), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "step-00000008 could not be saved" in done.stderr
    assert f"{saved} is intact: go on from it with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == [saved]
    in_process(line)
    in_process(command(whole, **more))
    assert weights(output) == weights(whole)


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_model_is_saved_is_named(command, in_process, tmp_path):
    output = tmp_path / "run"
    fields = {"max_steps": 4, "save_every": 4, "eval_every": 0, "resume": True}
    in_process(command(output, **fields))
    whole = weights(output)
    shutil.rmtree(output / "final")
    room = len(whole) // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    line = command(output, **fields)  # it is done, and writes the model again
    done = subprocess.run(
        line, env=environment(), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{output / 'final'} could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(output.glob("*final"))
    in_process(line)
    assert weights(output) == whole


def test_a_finished_run_goes_on_with_extra_steps(command, in_process, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    in_process(command(short))
    with pytest.raises(CheckpointError, match=r"max_steps: 12 -> 20.*extra_steps"):
        in_process(command(short, max_steps=20, resume=True))
    in_process(command(short, extra_steps=8, resume=True))
    in_process(command(long, extra_steps=8))
    assert weights(short) == weights(long)
    assert records(short, "eval")[-1]["step"] == 20
    rates = [r["learning_rate"] for r in records(short, "train") if r["step"] >= 12]
    assert rates == pytest.approx([3e-4] * 5)


def test_a_term_that_is_not_trained_on_may_be_anything(command, in_process, tmp_path, monkeypatch):
    import recipe

    class Idle(_Breaking):
        def attach(self, training):
            class Watched(Acting):
                def loss(self, step, batch, output):
                    return {"watched": Term(output.loss.detach() * float("inf"), 0.0)}

            return Watched()

    plain, watched = tmp_path / "plain", tmp_path / "watched"
    in_process(command(plain))
    monkeypatch.setattr(recipe.Recipe, "acting_methods", lambda self: [Idle(())])
    in_process(command(watched))
    assert weights(plain) == weights(watched)
    assert records(watched, "train")[-1]["skipped_updates"] == 0


def test_a_term_that_would_train_nothing_is_an_error(command, in_process, tmp_path, monkeypatch):
    import recipe

    class Cut(_Breaking):
        def attach(self, training):
            class Detached(Acting):
                def loss(self, step, batch, output):
                    return {"cut": Term(output.loss.detach())}

            return Detached()

    monkeypatch.setattr(recipe.Recipe, "acting_methods", lambda self: [Cut(())])
    with pytest.raises(RuntimeError, match="cut would train nothing"):
        in_process(command(tmp_path / "run"))


def test_the_dense_baseline_of_a_patched_model_is_refused(command, in_process, tmp_path):
    in_process(command(tmp_path / "relu", max_steps=2, eval_every=0))
    with pytest.raises(ValueError, match=r"patch='none' is the dense baseline.*patched already"):
        in_process(command(tmp_path / "run", model=tmp_path / "relu/final", patch="none"))
