"""What a finished run tells: its report, the card of its model, and what a push makes of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from run_log import read_log
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.card_metadata import read
from hf_sparse.hub_facts import Facts
from hf_sparse.metrics import SparsityReport
from hf_sparse.training_facts import FILE, with_facts
from support.loopback_hub import LoopbackHub

NOTHING = dict.fromkeys(("report", "before", "evaluated_on", "speed", "recipe", "base_model", "datasets"))


@pytest.fixture(scope="module")
def finished(command, in_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    in_process(command(output, max_steps=8, methods={"mixing": {"until": 0.5}}))
    return output


def records(output: Path, kind: str) -> list[dict]:
    return [r for r in read_log(output / "log.jsonl") if r["kind"] == kind]


def rows(text: str, first: str) -> list[list[str]]:
    """Of the table whose first head is ``first``: its rows."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_report_has_the_numbers_of_the_log(finished):
    text = (finished / "report.md").read_text()
    original, evaluated = records(finished, "original")[0], records(finished, "eval")
    expected = [("original", original), ("patched, not trained", evaluated[0]), ("final", evaluated[-1])]
    found = rows(text, " | loss")
    assert [row[0] for row in found] == [name for name, _ in expected]
    for row, (_, record) in zip(found, expected, strict=True):
        assert row[1:4] == [
            f"{record['loss']:.4g}",
            f"{record['perplexity']:.4g}",
            f"{record['sparsity']:.2%}",
        ]
        assert row[5] == str(record["dead"])
    layers = {row[0].strip("`"): row[1:] for row in rows(text, "MLP block")}
    for name, share in evaluated[-1]["layers"].items():
        assert layers[name][:3] == ["0.00%", f"{evaluated[0]['layers'][name]:.2%}", f"{share:.2%}"]
    assert [row[0] for row in rows(text, "update")] == ["0", "6", "8"]
    assert "8 updates, 1,024 tokens" in text
    assert f"{torch.__version__}" in text
    told = yaml.safe_load(text[text.index("```yaml") + 7 : text.rindex("```")])
    assert told == records(finished, "run")[0]["recipe"]
    for name in ("report-run.png", "report-layers.png"):
        assert f"]({name})" in text
        with Image.open(finished / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3  # drawn on


def test_the_card_beside_the_model_has_what_was_measured_and_the_recipe(finished):
    text = (finished / "final/README.md").read_text()
    last = records(finished, "eval")[-1]
    assert (
        f"| perplexity | {records(finished, 'original')[0]['perplexity']:.4g} | {last['perplexity']:.4g}"
        in text
    )
    assert "held-out text of texts" in text  # a folder's name, and not where it is
    told = yaml.safe_load(text[text.index("```yaml") + 7 : text.rindex("```\n<!-- hf_sparse.push")])
    assert told["methods"] == {"mixing": {"until": 0.5}}
    assert told["max_steps"] == 8
    assert str(finished.parent) not in text
    assert {m["type"]: m["value"] for m in read(text)["model-index"][0]["results"][0]["metrics"]} == {
        "perplexity": pytest.approx(last["perplexity"], abs=1e-5),
        "activation_sparsity": pytest.approx(last["sparsity"], abs=1e-5),
    }


def test_a_dense_baseline_has_a_report_and_no_card(command, in_process, tmp_path):
    in_process(command(tmp_path / "run", max_steps=2, patch="none"))
    assert "patched with `none`" in (tmp_path / "run/report.md").read_text()
    assert not (tmp_path / "run/final/README.md").exists()
    assert not (tmp_path / "run/final" / FILE).exists()


def test_facts_are_of_the_very_weights(finished, tmp_path):
    folder = tmp_path / "final"
    shutil.copytree(finished / "final", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    facts = with_facts(model, NOTHING)
    assert facts["report"].perplexity == records(finished, "eval")[-1]["perplexity"]
    assert facts["report"].sequence_length == 16
    assert facts["before"] == SparsityReport.from_json(finished / "measured/original.json")
    assert facts["recipe"]["max_steps"] == 8
    assert facts["datasets"] is None

    # What is given wins, and a measurement takes the place of all of them.
    other = hf_sparse.measure(model, [{"input_ids": torch.arange(3, 40)[None]}])
    given = with_facts(model, {**NOTHING, "report": other})
    assert (given["report"], given["before"], given["evaluated_on"]) == (other, None, None)
    assert given["recipe"] == facts["recipe"]

    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    with pytest.warns(UserWarning, match="other weights than this model has now"):
        assert with_facts(model, NOTHING) == NOTHING
    (folder / FILE).write_text("{}")
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        with_facts(model, NOTHING)


PUSH = """
import sys, hf_sparse
from transformers import AutoModelForCausalLM
hf_sparse.push_to_hub(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "me/relu")
"""


@pytest.mark.slow
def test_a_push_brings_what_the_training_measured(finished, tmp_path):
    with LoopbackHub() as hub:
        hub.run(PUSH, str(finished / "final"), home=tmp_path)
        card = hub.repositories["me/relu"]["README.md"].decode()
        assert FILE not in hub.repositories["me/relu"]
    last = records(finished, "eval")[-1]
    assert f"{last['perplexity']:.4g}" in card
    assert 'from_pretrained("me/relu")' in card
    assert "max_steps: 8" in card
    assert read(card)["model-index"][0]["name"] == "relu"


def test_a_finished_run_that_is_resumed_writes_them_again(finished, command, in_process, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for name in ("report.md", "report-run.png", "final/README.md", f"final/{FILE}"):
        (output / name).unlink()
    in_process(command(output, max_steps=8, methods={"mixing": {"until": 0.5}}, resume=True))
    assert rows((output / "report.md").read_text(), " | loss") == rows(
        (finished / "report.md").read_text(), " | loss"
    )
    assert json.loads((output / "final" / FILE).read_text()) == json.loads(
        (finished / "final" / FILE).read_text()
    )
    assert "perplexity" in (output / "final/README.md").read_text()


def test_without_a_measurement_of_the_original_the_card_has_that_of_the_model(
    finished, command, in_process, tmp_path
):
    """As after a sharded run, whose original may fit no device."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "measured/original.json").unlink()
    in_process(command(output, max_steps=8, methods={"mixing": {"until": 0.5}}, resume=True))
    assert "Not measured: the dense model, speed." in (output / "final/README.md").read_text()


def test_what_is_trained_from_scratch_has_no_base_model(command, in_process, tmp_path):
    in_process(command(tmp_path / "run", max_steps=2, from_scratch=True))
    assert rows((tmp_path / "run/report.md").read_text(), " | loss")[0][0] == "random weights"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    for scratch, base in ((True, None), (False, "someone/llama")):
        given = {**NOTHING, "recipe": {"model": "someone/llama", "from_scratch": scratch}}
        assert Facts.read(model, **given).base_model == base


def test_adapters_are_merged_and_told_of_by_the_names_of_the_model(command, in_process, tmp_path):
    in_process(command(tmp_path / "run", max_steps=4, lora={"r": 2}))
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    for kind in ("original", "train", "eval"):
        assert list(records(tmp_path / "run", kind)[-1]["layers"]) == names
    facts = with_facts(AutoModelForCausalLM.from_pretrained(tmp_path / "run/final"), NOTHING)
    assert [layer.name for layer in facts["report"].layers] == names
    assert "| perplexity |" in (tmp_path / "run/final/README.md").read_text()
