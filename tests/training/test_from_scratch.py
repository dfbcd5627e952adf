"""Training from scratch: T5 by span corruption and decoders, at any size, with the papers' modules."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from arguments import load_yaml
from evaluation import _batches
from loading import load, sized_config
from recipe import Recipe
from run_log import read_log
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_sparse
from hf_sparse.metrics import measure
from support.runs import TRAINING

MODULES = {
    "patch": {"activation": "jsrelu", "zeroth_bias": {"positions": 32}},
    "methods": {"norm_clamp": {}, "zeroth_clip": {"share": 0.1}},
    "from_scratch": True,
}
T5 = {**MODULES, "task": "span_corruption", "decay": "inverse_sqrt", "sequence_length": 24}


def weights(folder: Path) -> bytes:
    return (folder / "final/model.safetensors").read_bytes()


def last(output: Path) -> dict:
    return [record for record in read_log(output / "log.jsonl") if record["kind"] == "eval"][-1]


@pytest.mark.slow
def test_a_t5_stopped_and_resumed_ends_with_the_same_weights(command, tiny_t5, in_process, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fields = {**T5, "model": tiny_t5, "eval_tokens": 400, "micro_batch": 3}
    in_process(command(whole, **fields))
    in_process(command(parts, **fields, keep_checkpoints=9))
    for late in ("step-00000008", "step-00000012"):
        shutil.rmtree(parts / "checkpoints" / late)
    shutil.rmtree(parts / "final")
    in_process(command(parts, **fields, resume=True))
    assert weights(parts) == weights(whole)
    begun, ended = (
        r["loss"] for r in read_log(whole / "log.jsonl") if r["kind"] == "eval" if r["step"] in (0, 12)
    )
    assert ended < begun - 0.2
    model = AutoModelForSeq2SeqLM.from_pretrained(whole / "final")
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            feed_forward = block.layer[-1]
            gain, table = feed_forward.layer_norm.weight, feed_forward.DenseReluDense.zeroth_bias.bias
            assert gain.min() >= 1
            assert 0 < (table.abs() / gain).max() <= 0.1 * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5_scratch", "decoder_scratch"])
def test_the_recipe_runs_on_a_tiny_model(name, tiny, tiny_t5, texts, in_process, tmp_path):
    model = tiny_t5 if name == "t5_scratch" else tiny
    given = {"model": model, "dataset": texts, "max_steps": 4, "output_dir": tmp_path}
    given |= {"sequence_length": 16, "global_batch": 8, "eval_tokens": 64}
    options = [word for field, value in given.items() for word in (f"--{field}", str(value))]
    recipe = ["--config", str(TRAINING / "recipes" / f"{name}.yaml")]
    in_process(["", "", *recipe, *options, "--no-progress", "--no-tensorboard"])
    assert last(tmp_path)["step"] == 4
    assert math.isfinite(last(tmp_path)["loss"])
    auto = AutoModelForSeq2SeqLM if name == "t5_scratch" else AutoModelForCausalLM
    assert hf_sparse.inspect(auto.from_pretrained(tmp_path / "final"))


def test_the_published_values():
    recipe = Recipe(**load_yaml(TRAINING / "recipes" / "t5_scratch.yaml"))
    assert (recipe.raw_length, recipe.sequence_length, recipe.global_batch) == (568, 512, 256)
    assert round(recipe.warmup * recipe.max_steps) == 10_000
    assert (recipe.learning_rate, recipe.weight_decay, recipe.decay) == (0.01, 0.001, "inverse_sqrt")


def test_weights_are_random_and_the_seed_decides_on_them(tiny):
    def fresh(**fields: object) -> torch.Tensor:
        model = load(Recipe(model=str(tiny), from_scratch=True, **fields))
        return model.model.layers[0].mlp.up_proj.weight

    published = load(Recipe(model=str(tiny))).model.layers[0].mlp.up_proj.weight
    assert load(Recipe(model=str(tiny), from_scratch=True)).name_or_path == ""  # it has no base model
    torch.manual_seed(123)
    first = fresh()
    assert torch.equal(first, fresh())
    assert not torch.equal(first, fresh(seed=1))
    assert not torch.equal(first, published)


def test_any_size_can_be_had(tiny, tiny_t5):
    def sizes(folder: Path, **changes: object) -> Recipe:
        return Recipe(model=str(folder), from_scratch=True, model_config=changes)

    llama = load(sizes(tiny, num_hidden_layers=1, intermediate_size=24))
    assert [tuple(layer.mlp.up_proj.weight.shape) for layer in llama.model.layers] == [(24, 32)]
    t5 = Recipe(**{**sizes(tiny_t5, num_layers=3, d_ff=24).to_dict(), "task": "span_corruption"})
    model = load(t5)
    assert (len(model.encoder.block), len(model.decoder.block)) == (3, 2)  # whose number its config states
    with pytest.raises(ValueError, match=r"model_config has layers, which LlamaConfig.*num_hidden_layers"):
        sized_config(str(tiny), "main", {"layers": 1})


def test_what_a_config_leaves_open_follows(tiny_t5, tmp_path):
    """As google-t5/t5-base leaves the number of decoder layers."""
    config = json.loads((tiny_t5 / "config.json").read_text())
    del config["num_decoder_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sized = sized_config(str(tmp_path), "main", {"num_hidden_layers": 5, "hidden_size": 16})
    assert (sized.num_layers, sized.num_decoder_layers, sized.d_model) == (5, 5, 16)


def test_what_fills_the_share_of_a_process_is_not_counted(tiny_t5):
    """Three sequences of four that this process goes through, as the other one has four."""
    model = load(Recipe(model=str(tiny_t5), task="span_corruption"))
    own = {"input_ids": torch.randint(23, 160, (3, 9)), "labels": torch.randint(23, 160, (3, 4))}
    filled = list(_batches(own, 4, 2))
    assert [len(batch["input_ids"]) for batch in filled] == [2, 2]
    expected, found = measure(model, [own]), measure(model, filled)
    assert found.layers == expected.layers
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_config": {"num_hidden_layers": 1}}, "model_config=.*from_scratch"),
        ({"from_scratch": True, "lora": {}}, "lora=.*from_scratch"),
        ({"task": "mlm"}, "task='mlm'.*causal, span_corruption"),
        ({"task": "span_corruption", "eval_tokens": 1100}, "eval_tokens=1100.*one text of 1137 tokens"),
    ],
)
def test_recipes_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_a_model_of_another_task_is_refused(tiny, tiny_t5):
    with pytest.raises(ValueError, match=r"task=causal trains a causal.*is a t5; task=span_corruption takes"):
        load(Recipe(model=str(tiny_t5)))
    with pytest.raises(ValueError, match=r"task=span_corruption trains an encoder-decoder.*is a llama"):
        load(Recipe(model=str(tiny), task="span_corruption"))


def test_there_is_nothing_to_distil_from():
    with pytest.raises(ValueError, match=r"from_scratch.*leave distillation out"):
        Recipe(from_scratch=True, methods={"distillation": {}})
