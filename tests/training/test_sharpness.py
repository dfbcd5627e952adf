"""SAM and its kin in the training application."""

from __future__ import annotations

import pytest
from recipe import Recipe
from run_log import read_log

WAYS = {
    "sam": {"rho": 0.1},
    "sparse_sam_fisher": {"rho": 0.1, "samples": 4, "interval": 5},
    "sparse_sam_dynamic": {"rho": 0.1, "interval": 5},
    "fisher_sam": {"rho": 0.1, "interval": 5},
}


def losses(output):
    return [r["loss"] for r in read_log(output / "log.jsonl") if r["kind"] == "eval"]


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_goes_on_has_the_masks_that_it_had(command, in_process, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fields = {"max_steps": 6, "eval_every": 0, "decay": "constant", "sharpness": {"name": name, **WAYS[name]}}
    in_process(command(whole, extra_steps=4, **fields))
    in_process(command(parts, **fields))
    in_process(command(parts, extra_steps=4, resume=True, **fields))
    assert (whole / "final/model.safetensors").read_bytes() == (
        parts / "final/model.safetensors"
    ).read_bytes()
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.parametrize("name", WAYS)
def test_the_cut_into_micro_batches_changes_nothing_but_rounding(command, in_process, tmp_path, name):
    ends = []
    for micro_batch in (8, 3):
        output = tmp_path / str(micro_batch)
        sharpness = {"name": name, **WAYS[name]}
        in_process(command(output, micro_batch=micro_batch, sharpness=sharpness, eval_every=0))
        ends.append(losses(output)[-1])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_a_target_is_of_the_model_at_its_own_weights(command, in_process, tmp_path):
    fields = {"max_steps": 3, "log_every": 1, "methods": {"target_sparsity": {"sparsity": 0.9}}}
    first = []
    for name, sharpness in (("plain", {}), ("sam", {"sharpness": {"name": "sam", "rho": 100.0}})):
        in_process(command(tmp_path / name, eval_every=0, **sharpness, **fields))
        records = [r for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "train"]
        first.append(records[0]["training_sparsity"])
    assert first[0] == first[1]


def test_it_is_another_training_than_without(command, in_process, tmp_path):
    in_process(command(tmp_path / "plain", eval_every=0))
    in_process(command(tmp_path / "sam", eval_every=0, sharpness="sam"))
    assert losses(tmp_path / "plain")[0] == losses(tmp_path / "sam")[0]
    assert losses(tmp_path / "plain")[-1] != losses(tmp_path / "sam")[-1]


@pytest.mark.parametrize(
    ("sharpness", "message"),
    [
        ({"name": "sam", "rho": 0}, r"sharpness\.rho=0"),
        ({"rho": 0.1}, r"sharpness\.name=None.*choose one of sam"),
        ({"name": "sparse_sam_fisher", "samples": 64}, r"sharpness\.samples=64.*global_batch=32"),
    ],
)
def test_a_bad_field_is_named(sharpness, message):
    with pytest.raises(ValueError, match=message):
        Recipe(sharpness=sharpness)
