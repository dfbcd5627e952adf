from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from arguments import build_parser, load_yaml, parse_recipe
from recipe import Recipe

from hf_sparse import SparsityConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": "gelu"}, r"patch: activation\.name='gelu'.*relu2"),
        (
            {"patch": {"activation": {"name": "fatrelu", "threshold": -1}}},
            r"patch: activation\.threshold=-1\.0",
        ),
        (
            {"patch": {"activation": {"name": "relu", "mix": 0.5}}},
            r"patch: activation\.mix=0.5.*method mixing",
        ),
        ({"compile": True, "gradient_checkpointing": True}, "compile=True.*gradient_checkpointing"),
        ({"compile": True, "skip_in_training": 0.1}, "skip_in_training=0.1.*compute every neuron"),
        ({"patch": "none", "skip_in_training": 0.1}, "skip_in_training=0.1.*no silent neurons"),
        ({"skip_in_training": 2.0}, "skip_in_training=2.0.*fraction"),
        ({"patch": {"treshold": 1}}, "patch: unknown fields in the config: treshold"),
        ({"patch": 3}, "patch: config=3 is neither"),
        ({"max_steps": 0}, "max_steps=0.*at least 1"),
        ({"max_steps": 10.5}, "max_steps=10.5.*whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast'.*finite number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0.*positive"),
        ({"warmup": 100.0}, "warmup=100.0.*fraction"),
        ({"global_batch": 12}, "global_batch=12.*data_streams=8"),
        ({"methods": {"l1": {"targets": [1.0]}}}, "l1: boundaries has 0 values and targets 1"),
        (
            {"methods": {"l1": {"boundaries": [0.5, 2.0], "targets": [1.0, 1.0]}}},
            r"methods\.l1\.boundaries.*fractions",
        ),
        ({"methods": {"l1": {"boundaries": [0.5, 0.4], "targets": [1.0, 1.0]}}}, "do not rise"),
        ({"methods": {"l1": {"boundaries": 1}}}, r"methods\.l1\.boundaries=1.*list"),
        ({"methods": {"l1": {"target": [1]}}}, r"unknown fields in methods\.l1: target; known: .*targets"),
        ({"methods": {"l2": {}}}, "unknown fields in methods: l2; known: .*l1"),
        ({"methods": ["l1"]}, "methods is a mapping"),
        ({"patch": "none", "methods": {"mixing": {}}}, r"methods\.mixing.*dense baseline"),
        ({"patch": "original", "methods": {"l1": {}}}, r"methods\.l1.*dense baseline"),
        (
            {"patch": {"activation": {"name": "relu", "threshold": 0.1}}},
            r"patch: activation\.threshold=0.1 has no meaning.*'fatrelu'",
        ),
        ({"eval_tokens": 10}, "eval_tokens=10.*sequence_length=1024"),
        ({"resume": "yes"}, "resume='yes'.*bool"),
        ({"revision": 3}, "revision=3.*text, or none"),
        ({"precision": "fp8"}, "precision='fp8'.*fp32, bf16, fp16"),
    ],
)
def test_a_bad_field_is_refused_by_name_value_and_mend(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "learning_rate: 1e-4\nmax_steps: 7\nmethods: {l1: {boundaries: [0.5, 1], targets: [1e-2, 2]}}\n"
    )
    line = ["--config", str(file), "--max-steps", "9", "--methods.l1.targets", "[3, 4]", "--resume"]
    recipe = parse_recipe([*line, "--patch.activation=jsrelu", "--methods.mixing.until=1e-1"])
    assert recipe.learning_rate == 1e-4
    assert recipe.max_steps == 9
    assert recipe.methods["l1"]["targets"] == [3, 4]
    assert recipe.methods["l1"]["boundaries"] == [0.5, 1]
    assert recipe.methods["mixing"] == {"until": 0.1}
    assert recipe.patch == "jsrelu"
    assert recipe.resume
    assert recipe.seed == Recipe().seed
    assert parse_recipe(["--config", str(file), "--methods", "{}"]).methods == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("activation: relu\n", "activation is no field of a recipe; it is part of patch"),
        ("learning_rat: 1\n", "unknown fields learning_rat; known fields: .*learning_rate"),
        ("just text", "field: value"),
        ("a: [1", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_yaml(file)


def test_mistakes_on_the_command_line_end_with_a_message_not_a_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(["--max_steps", "0"])
    assert end.value.code == 2
    assert "max_steps=0" in capsys.readouterr().err


def test_every_field_is_documented_in_the_help():
    text = build_parser().format_help()
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "examples:" in text
    for heading in ("model:", "sparsity:", "data:", "optimisation:", "evaluation:", "output:"):
        assert heading in text


@pytest.mark.parametrize(
    ("given", "kept", "config"),
    [
        ("relu", "relu", SparsityConfig()),
        ("none", "none", None),
        ("original", "none", None),
        ("{activation: jsrelu}", "jsrelu", SparsityConfig.read("jsrelu")),
        (
            "{activation: {name: fatrelu, threshold: 1e-2}, layers: [1, 0]}",
            {"activation": {"name": "fatrelu", "threshold": 0.01}, "layers": [0, 1]},
            SparsityConfig.read("fatrelu", threshold=0.01, layers=[0, 1]),
        ),
    ],
)
def test_patch_is_a_sparsity_config_in_the_file_and_on_the_command_line(tmp_path, given, kept, config):
    (tmp_path / "r.yaml").write_text(f"patch: {given}\n")
    for line in (["--patch", given], [f"--patch={given}"], ["--config", str(tmp_path / "r.yaml")]):
        recipe = parse_recipe(line)
        assert recipe.patch == kept
        assert recipe.sparsity_config() == config
    again = Recipe(**json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.changed(recipe.to_dict()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--activation", "relu"], "--activation is no field of a recipe; it is part of patch"),
        (["--threshold=0.1"], "fatrelu, threshold"),
        (["--methods.l1.scale"], "--methods.l1.scale: expected one value"),
        (["--methods.l1.scale", "--resume"], "--methods.l1.scale: expected one value"),
        (["--methods.l1.scales=2"], "unknown fields in methods.l1: scales"),
        (["--seed.a=2"], "seed"),
        (["--max-stepz", "1"], "unrecognized arguments: --max-stepz"),
        (["--patch", "{activation: [relu"], "neither a name nor a mapping"),
        (["--patch", "fatrelu2"], "patch: activation.name='fatrelu2' is not known"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(line, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(line)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_options_have_dashes_and_underscores_are_as_good():
    dashes = parse_recipe(["--max-steps", "7", "--output-dir=a_b--c_d", "--no-gradient-checkpointing"])
    assert dashes == parse_recipe(
        ["--max_steps", "7", "--output_dir=a_b--c_d", "--no-gradient_checkpointing"]
    )
    assert (dashes.max_steps, dashes.output_dir) == (7, "a_b--c_d")
    assert "_" not in "".join(re.findall(r"--[a-z][-_a-z0-9]*", build_parser().format_usage()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert isinstance(Recipe(**load_yaml(path)), Recipe)
    assert path.read_text().startswith("# ")


def test_the_prosparse_recipe_is_the_published_schedule():
    l1, shift = Recipe(**load_yaml(ROOT / "training/recipes/prosparse.yaml")).acting_methods()
    assert shift.threshold == 0.01
    schedule = l1.schedule(16500)
    assert [round(b) for b in schedule.boundaries] == [6000, 10000, 12000, 16000, 16500]
    assert round(schedule.start) == 5000
    assert schedule.targets == (5e-3, 5e-2, 5e-2, 2e-1, 2e-1)


def test_recipes_that_are_compared_train_on_the_same_tokens():
    relu, prosparse, dense = (
        Recipe(**load_yaml(ROOT / f"training/recipes/{name}.yaml")) for name in ("relu", "prosparse", "dense")
    )
    for other in (relu, prosparse):
        differing = {c.split(":")[0] for c in other.changed(dense.to_dict())}
        assert differing <= {"patch", "methods"}


def test_a_changed_field_matters_or_not():
    recipe = Recipe(max_steps=10)
    before = json.loads(json.dumps(Recipe().to_dict()))
    assert recipe.changed(before) == ["max_steps: 1000 -> 10"]
    assert Recipe(output_dir="x", micro_batch=2, log_every=1, resume=True).changed(before) == []
    del before["seed"]  # written by a version that did not have the field
    assert Recipe().changed(before) == []
    assert Recipe(seed=1).changed(before) == ["seed: None -> 1"]


def test_shipped_recipes_hold_plain_yaml():
    for path in RECIPES:
        assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"methods": {"blockwise": {}, "distillation": {}}},
            "blockwise and distillation cannot act together",
        ),
        (
            {"methods": {"norm_uplift": {}, "blockwise": {}}},
            "blockwise and norm_uplift cannot act together",
        ),
        (
            {"methods": {"target_sparsity": {"sparsity": 0.5}, "threshold_shift": {}}},
            r'threshold_shift cannot act together so; it would take back the .*set lever="l1"',
        ),
        ({"methods": {"norm_clamp": {}}}, r"methods\.norm_clamp.*from_scratch.*norm_uplift"),
        (
            {"from_scratch": True, "methods": {"distillation": {}}},
            "from_scratch=True.*leave distillation out",
        ),
        (
            {"lora": {"biases": False}, "patch": {"activation": "relu", "zeroth_bias": {"positions": 8}}},
            r"lora\.biases=False.*stay zero",
        ),
        ({"lora": {"norms": False}, "methods": {"norm_uplift": {}}}, r"lora\.norms=False.*norm_uplift"),
        (
            {"methods": {"blockwise": {}}, "patch": {"zeroth_bias": {"positions": 8}}},
            "blockwise cannot train zeroth biases",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("goal", "changed"), [({"sparsity": 0.5}, []), ({"perplexity": 5.0}, ["eval_every"])]
)
def test_when_evaluations_are_made_matters_where_they_steer(goal, changed):
    before = Recipe(methods={"target_sparsity": goal}).to_dict()
    now = Recipe(methods={"target_sparsity": goal}, eval_every=7)
    assert [change.split(":")[0] for change in now.changed(before)] == changed
