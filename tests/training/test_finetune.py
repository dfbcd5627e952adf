from __future__ import annotations

import math
import shutil

import pytest
import torch
from checkpoint import CheckpointError
from data import DataExhaustedError, evaluation_data, open_documents
from recipe import Recipe
from run_log import read_log
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.metrics import measure


def records(output, kind):
    return [r for r in read_log(output / "log.jsonl") if r["kind"] == kind]


def held_out_batches(line, tokenizer):
    from arguments import parse_recipe

    recipe = parse_recipe(line[2:])
    sequences, _ = evaluation_data(recipe, open_documents(recipe), tokenizer)
    return [{"input_ids": sequences}]


def test_train_save_reload(command, in_process, tmp_path, tokenizer):
    output = tmp_path / "run"
    line = command(output, max_steps=40, methods={"l1": {"boundaries": [1.0], "targets": [0.05]}})
    in_process(line)

    first, last = records(output, "eval")[0], records(output, "eval")[-1]
    assert (first["step"], last["step"]) == (0, 40)
    assert last["loss"] < first["loss"] - 0.5
    assert records(output, "original")[0]["sparsity"] == 0
    assert 0.3 < first["sparsity"] < 0.7

    model = AutoModelForCausalLM.from_pretrained(output / "final", dtype=torch.float32)
    assert hf_sparse.inspect(model).config.activation.name == "relu"
    report = measure(model, held_out_batches(line, tokenizer))
    assert report.loss == pytest.approx(last["loss"], rel=1e-6)
    assert report.perplexity == pytest.approx(last["perplexity"], rel=1e-6)
    assert report.sparsity == pytest.approx(last["sparsity"], abs=1e-4)
    assert AutoTokenizer.from_pretrained(output / "final")("cat").input_ids == tokenizer("cat").input_ids


def test_a_part_of_the_blocks_is_patched_trained_and_told(command, in_process, tmp_path):
    output = tmp_path / "run"
    fields = {"patch": {"activation": "relu", "layers": [0]}, "max_steps": 4, "eval_every": 2}
    in_process(command(output, methods={"target_sparsity": {"sparsity": 0.8}}, **fields))
    layers = records(output, "eval")[-1]["layers"]
    assert [share > 0.3 for share in layers.values()] == [True] + [False] * (len(layers) - 1)
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    assert hf_sparse.inspect(model).config.layers == (0,)
    assert "model.layers.1.mlp" in (output / "final" / "README.md").read_text()
    assert "In the end the activation is fatrelu (threshold" in (output / "report.md").read_text()


def test_a_patch_that_the_model_has_already_is_told(command, in_process, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    in_process(command(first, max_steps=2, patch={"activation": {"name": "fatrelu", "threshold": 0.1}}))
    in_process(command(second, max_steps=2, model=str(first / "final"), patch="relu"))
    assert "is patched already, with fatrelu (threshold 0.1); patch= replaces that" in capsys.readouterr().out


def test_the_log_has_every_step_and_setting(command, in_process, tmp_path):
    output = tmp_path / "run"
    in_process(command(output, max_steps=10, log_every=4, warmup=0.2, methods={"mixing": {"until": 0.4}}))
    train = records(output, "train")
    assert [r["step"] for r in train] == [4, 8, 10]
    assert [r["tokens"] for r in train] == [4 * 128, 8 * 128, 10 * 128]
    assert [r["mix"] for r in train] == [1.0, 1.0, 1.0]
    assert train[-1]["learning_rate"] == pytest.approx(3e-4)
    assert all(r["tokens_per_second"] > 0 for r in train)
    run = records(output, "run")[0]
    assert Recipe(**run["recipe"]).max_steps == 10
    assert run["architecture"] == "LlamaForCausalLM"


@pytest.mark.slow
def test_l1_raises_sparsity_over_plain_substitution_on_the_same_tokens(command, in_process, tmp_path):
    found = {}
    for name, l1 in (
        ("relu", {}),
        ("l1", {"methods": {"l1": {"boundaries": [0.3, 1.0], "targets": [1.0, 5.0]}}}),
    ):
        in_process(command(tmp_path / name, max_steps=60, **l1))
        found[name] = records(tmp_path / name, "eval")[-1]
    assert found["l1"]["sparsity"] > found["relu"]["sparsity"] + 0.1


def test_the_dense_baseline_is_the_stock_model(command, in_process, tmp_path):
    in_process(command(tmp_path / "run", patch="none"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert model.config.hidden_act == "silu"
    assert not hasattr(model.config, "hf_sparse")
    assert records(tmp_path / "run", "eval")[0]["loss"] == records(tmp_path / "run", "original")[0]["loss"]


@pytest.mark.parametrize(
    "changes", [{"micro_batch": 2}, {"micro_batch": 3}, {"gradient_checkpointing": True}]
)
def test_memory_settings_do_not_change_what_is_learned(changes, command, in_process, tmp_path):
    l1 = {"methods": {"l1": {"boundaries": [1.0], "targets": [1.0]}}, "log_every": 1}
    for name, extra in (("a", {}), ("b", changes)):
        in_process(command(tmp_path / name, **l1, **extra))
    a, b = (records(tmp_path / name, "train") for name in ("a", "b"))
    for name in ("loss", "l1", "gradient_norm"):
        expected = torch.tensor([r[name] for r in a], dtype=torch.float64)
        found = torch.tensor([r[name] for r in b], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_bf16_keeps_float32_master_weights(command, in_process, tmp_path):
    in_process(command(tmp_path / "run", precision="bf16", max_steps=40))
    assert records(tmp_path / "run", "eval")[-1]["loss"] < records(tmp_path / "run", "eval")[0]["loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype="auto")
    assert model.dtype == torch.float32
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_tensorboard_has_the_same_numbers(command, in_process, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = [option for option in command(tmp_path / "run") if option != "--no-tensorboard"]
    in_process(line)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("train/loss")}
    expected = {r["step"]: pytest.approx(r["loss"], rel=1e-6) for r in records(tmp_path / "run", "train")}
    assert logged == expected
    assert "eval/layers/model.layers.0.mlp" in events.Tags()["scalars"]


def test_a_folder_with_a_run_is_not_overwritten(command, in_process, tmp_path):
    in_process(command(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="continue it with --resume"):
        in_process(command(tmp_path / "run"))


def test_resuming_another_recipe_is_refused_by_field(command, in_process, tmp_path):
    in_process(command(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"Changed: learning_rate: 0.003 -> 0.1; seed: 42 -> 7"):
        in_process(command(tmp_path / "run", resume=True, learning_rate=0.1, seed=7))
    in_process(command(tmp_path / "run", resume=True, log_every=1, keep_checkpoints=1))


@pytest.mark.slow
def test_running_out_of_data_says_where_and_what_to_do(command, in_process, tmp_path):
    with pytest.raises(
        DataExhaustedError, match=r"stream \d gave \d+ sequences.*Lower max_steps to \d+ or less"
    ):
        in_process(command(tmp_path / "run", max_steps=5000))


def test_divergence_ends_the_run(command, in_process, tmp_path):
    with pytest.raises(FloatingPointError, match="diverged"):
        in_process(command(tmp_path / "run", learning_rate=1e30, clip_norm=0.0, warmup=0.0, max_steps=100))


def test_a_sequence_beyond_the_positions_is_refused(command, in_process, tmp_path):
    with pytest.raises(ValueError, match="sequence_length=128 is more than the 64 positions"):
        in_process(command(tmp_path / "run", sequence_length=128))


@pytest.mark.slow
def test_real_llama_on_real_c4(assets, command, in_process, tmp_path):
    """A short finetune of the 260K-parameter Llama on C4 documents heals the substitution."""
    fields = {"model": assets / "stories260K", "dataset": assets / "c4", "sequence_length": 128}
    in_process(command(tmp_path / "run", **fields, max_steps=30, eval_tokens=2560, learning_rate=1e-3))
    original = records(tmp_path / "run", "original")[0]
    before, *_, after = records(tmp_path / "run", "eval")
    assert original["perplexity"] < 100 < before["perplexity"]
    assert after["perplexity"] < original["perplexity"]  # C4 is new to it
    assert math.isclose(after["perplexity"], math.exp(after["loss"]))
    assert after["sparsity"] > 0.35


def test_lora_trains_adapters_norms_and_biases_and_is_merged(command, in_process, tiny, tmp_path):
    output = tmp_path / "lora"
    methods = {"l1": {"boundaries": [1.0], "targets": [0.1]}}
    in_process(command(output, lora={"r": 4, "alpha": 8}, methods=methods))
    trained = AutoModelForCausalLM.from_pretrained(output / "final")
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = trained.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name or "proj" in name}
    for name in changed:
        if "proj" in name:
            assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    first, *_, last = records(output, "eval")
    assert last["loss"] < first["loss"]
    sequences = [{"input_ids": torch.arange(64).view(4, 16)}]
    assert measure(trained, sequences).sparsity > 0.1


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"r": 0}, "lora.r=0"), ({"rank": 2}, "unknown fields in lora: rank"), ("all", "lora is a mapping")],
)
def test_a_bad_field_of_lora_is_named(lora, message):
    with pytest.raises(ValueError, match=message):
        Recipe(lora=lora)


def test_fp16_is_refused_on_a_cpu(command, in_process, tmp_path):
    with pytest.raises(ValueError, match=r"precision='fp16' needs a GPU"):
        in_process(command(tmp_path, precision="fp16"))


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "micro_batch": 4}])
def test_skipping_in_training_changes_roundings_alone(changes, command, in_process, tmp_path, capsys):
    fields = {"patch": {"activation": {"name": "shifted_relu", "shift": 0.1}}, "log_every": 5}
    in_process(command(tmp_path / "dense", **fields))
    in_process(command(tmp_path / "skipping", skip_in_training=1.0, **fields, **changes))
    assert "2 MLP blocks skip in training where at most 100% is active" in capsys.readouterr().out
    for kind in ("train", "eval"):
        dense, skipping = (records(tmp_path / name, kind) for name in ("dense", "skipping"))
        for one, other in zip(dense, skipping, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["sparsity"] == pytest.approx(one["sparsity"], abs=1e-3)
    own, usual = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}/final") for n in ("skipping", "dense")
    )
    assert any(not torch.equal(a, b) for a, b in zip(own.parameters(), usual.parameters(), strict=True))


def test_a_run_that_skips_goes_on_as_if_it_had_not_stopped(command, in_process, tmp_path):
    fields = {"patch": {"activation": {"name": "shifted_relu", "shift": 0.1}}, "skip_in_training": 1.0}
    for name in ("whole", "stopped"):
        in_process(command(tmp_path / name, **fields))
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000012")
    shutil.rmtree(tmp_path / "stopped/final")
    in_process(command(tmp_path / "stopped", resume=True, **fields))
    whole, stopped = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
