from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from checkpoint import CheckpointError, Checkpoints, Progress, read_state, verify, written_whole
from data import StreamState
from torch import nn

RECIPE = {"data_streams": 2, "seed": 1}


def progress(step: int) -> Progress:
    streams = {v: StreamState(epoch=0, block=3, reader={"at": v}, document=2, token=7) for v in range(2)}
    return Progress(
        step,
        step * 100,
        skipped=2,
        pending={"loss": [0.1, 2.5]},
        methods={"controller": {"sum": 0.1}},
        streams=streams,
    )


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A small model with an optimizer that has state, and the checkpoints of steps 10, 20 and 30."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    accelerator = Accelerator()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    checkpoints = Checkpoints(accelerator, tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        accelerator.backward(model(torch.randn(3, 4)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        checkpoints.save(progress(step), RECIPE)
    return checkpoints, tmp_path / "checkpoints", model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_are_kept(setup):
    checkpoints, folder, *_ = setup
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert checkpoints.newest().name == "step-00000030"


def test_everything_comes_back(setup):
    checkpoints, _, model, optimizer = setup
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    drawn = torch.rand(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    found = checkpoints.load(checkpoints.newest())
    assert found == progress(30)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)
    assert torch.equal(torch.rand(3), drawn)
    assert read_state(checkpoints.newest())["recipe"] == RECIPE


def test_what_an_interrupted_save_left_is_ignored_and_removed(setup):
    checkpoints, folder, *_ = setup
    left = folder / ".incomplete-step-00000040"
    shutil.copytree(folder / "step-00000030", left)
    (left / "manifest.json").unlink()
    (folder / ".incomplete-discarded-step-00000010").mkdir()
    assert checkpoints.newest().name == "step-00000030"
    assert names(folder) == ["step-00000020", "step-00000030"]


def damage_flip(path: Path) -> None:
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_cut(path: Path) -> None:
    file = path / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-10])


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format_version": 1')


def damage_version(path: Path) -> None:
    (path / "manifest.json").write_text('{"format_version": 99, "files": []}')


DAMAGES = [
    (damage_flip, r"model.safetensors is damaged"),
    (damage_cut, r"optimizer.bin has \d+ bytes instead of \d+"),
    (lambda path: (path / "stream-0001.json").unlink(), r"stream-0001.json is missing"),
    (damage_manifest, r"manifest.json cannot be read"),
    (damage_version, r"format_version 99; this code reads 1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_named_and_the_earlier_checkpoint_used(setup, damage, message):
    checkpoints, folder, *_ = setup
    damage(folder / "step-00000030")
    with pytest.raises(CheckpointError, match=f"step-00000030: {message}"):
        verify(folder / "step-00000030")
    with pytest.warns(UserWarning, match=f"{message}.*Continuing from the earlier step-00000020"):
        assert checkpoints.newest().name == "step-00000020"
    # Training on reaches the damaged step again and replaces it.
    checkpoints.save(progress(30), RECIPE)
    verify(folder / "step-00000030")


def test_no_intact_checkpoint_is_an_error_not_a_new_run(setup):
    checkpoints, folder, *_ = setup
    for name in names(folder):
        damage_flip(folder / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact.*step-00000030.*step-00000020"):
        checkpoints.newest()


def test_no_checkpoints_is_a_new_run(setup, tmp_path):
    accelerator = Accelerator()
    empty = Checkpoints(accelerator, tmp_path / "other", keep=1)
    assert not empty.exists()
    assert empty.newest() is None


def test_files_of_a_process_that_wrote_elsewhere_are_missed(setup):
    checkpoints, folder, *_ = setup
    partial = progress(40)
    del partial.streams[1]
    with pytest.raises(CheckpointError, match=r"stream-0001.json did not arrive.*share"):
        checkpoints.save(partial, RECIPE)
    assert "step-00000040" not in names(folder)


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path):
    def write(content, room):
        with written_whole(tmp_path / "final") as (aside, _):
            aside.mkdir()
            (aside / "a").write_text(content[:room])
            if len(content) > room:
                raise OSError(28, "No space left on device")

    for content in ("old", "new"):
        write(content, room=9)
    with pytest.raises(CheckpointError, match=r"final could not be saved: OSError: .*--resume writes it"):
        write("newest", room=3)
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final" / "a").read_text() == "new"


def test_damaged_checkpoints_that_were_passed_over_do_not_push_out_good_ones(setup):
    checkpoints, folder, *_ = setup
    (folder / "step-00000030" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-00000030.*Continuing from the earlier step-00000020"):
        assert checkpoints.newest().name == "step-00000020"
    checkpoints.save(progress(25), RECIPE)
    assert names(folder) == ["step-00000020", "step-00000025"]
