"""What a model card is made of: what is refused before anything is sent, and whose metadata change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model

import hf_sparse
from hf_sparse.card_marks import PATCH, PUSHED
from hf_sparse.card_metadata import read, with_metadata, without_metadata
from hf_sparse.hub_card import full_card
from hf_sparse.hub_facts import Facts

OURS = ModelCardData(library_name="transformers", tags=["hf_sparse", "relu"], base_model="a/b")


@pytest.fixture
def patched(tiny_model):
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    return model


def report(model) -> hf_sparse.SparsityReport:
    return hf_sparse.measure(model, [{"input_ids": torch.arange(3, 40)[None]}])


def card(model, readme: str = "# m\n", **given: Any) -> str:
    names = ("report", "before", "evaluated_on", "speed", "recipe", "base_model", "datasets")
    found = hf_sparse.inspect(model)
    facts = Facts.read(model, **{**dict.fromkeys(names), **given})
    return full_card(readme, model, found, facts, repo_id="me/m", revision=None, tokenizer=None)


def test_an_unpatched_model_is_not_pushed(tiny_model) -> None:
    with pytest.raises(hf_sparse.PatchError, match=r"not patched.*model.push_to_hub\(\.\.\.\) pushes it"):
        hf_sparse.push_to_hub(tiny_model("llama"), "me/m")


def test_what_stands_beside_the_activation_is_named(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original", topk={"share": 0.1}, norm_relu=True)
    text = card(model)
    assert "with `silu`. They also have `topk (share 0.1)` and `norm_relu`." in text
    assert "is exactly zero need not be computed" in text


def test_an_adapter_is_not_taken_for_a_model(patched) -> None:
    wrapped = get_peft_model(patched, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(hf_sparse.PatchError, match=r"merge_and_unload"):
        hf_sparse.push_to_hub(wrapped, "me/m")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repo_id": "me/m/x"}, "me/m/x"),
        ({"tokenizer": "gpt2"}, "tokenizer='gpt2' has no save_pretrained"),
        ({"create_pr": True, "revision": "wip"}, "leave out revision='wip'"),
        ({"base_model": "./llama"}, "base_model='./llama' is not the Hub id of a model"),
        ({"datasets": ["allenai/c4", "/data/c4"]}, "datasets='/data/c4' is not the Hub id"),
        ({"evaluated_on": "allenai/c4"}, "evaluated_on= needs report="),
        ({"report": 0.9}, "report=0.9 is no SparsityReport"),
        ({"recipe": {"patch": object()}}, "recipe has a value that is no plain one"),
        ({"speed": "fast <!-- hf_sparse: end -->"}, "speed contains '<!-- hf_sparse'"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_sent(patched, given, said) -> None:
    with pytest.raises(ValueError, match="(?s)" + said.replace("(", r"\(")):
        hf_sparse.push_to_hub(patched, **{"repo_id": "me/m", **given})


def test_a_recipe_file_is_read_as_it_is(patched, tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# A comment with ``` in it.\nmodel: someone/dense\ndataset: ./texts\n")
    text = card(patched, recipe=path)
    assert "````yaml\n# A comment with ``` in it.\nmodel: someone/dense\ndataset: ./texts\n````" in text
    assert read(text)["base_model"] == "someone/dense"
    assert "datasets" not in read(text)
    path.write_text("just words")
    with pytest.raises(ValueError, match="no YAML file of fields"):
        card(patched, recipe=path)


def test_a_report_on_another_model_is_refused(patched, tiny_model) -> None:
    own, other = report(patched), report(tiny_model("llama", intermediate_size=72))
    with pytest.raises(ValueError, match=r"before is about another model: this LlamaForCausalLM has no MLP"):
        card(patched, report=own, before=other)
    with pytest.raises(ValueError, match="sequence_length=None and before 32"):
        card(patched, report=own, before=replace(own, sequence_length=32))


def test_a_report_on_a_model_of_which_a_part_is_patched(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu", layers=[1])
    text = card(model, report=report(model), before=report(tiny_model("llama")))
    assert all(f"model.layers.{i}.mlp" in text for i in range(3))


def test_texts_that_differ_are_said_to(patched) -> None:
    own = report(patched)
    text = card(patched, report=own, before=replace(own, tokens=7))
    assert "The numbers of tokens differ, so the text was not the same." in text


def test_a_loss_that_is_no_number_is_no_result(patched) -> None:
    text = card(patched, report=replace(report(patched), loss=float("nan")), evaluated_on="my own text")
    (result,) = read(text)["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["activation_sparsity"]
    assert result["dataset"] == {"name": "my own text", "type": "text"}


def test_what_tune_found_says_on_which_machine(patched, own_cache) -> None:
    found = hf_sparse.tune(patched, tokens=(1,))
    text = card(patched, speed=found)
    assert "Speed:\n\n```text\nlayer" in text
    assert "threads" in text.partition("Speed:")[2]


def test_with_the_original_activation_nothing_is_claimed_to_be_sparse(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original")
    text = card(model)
    assert "3 MLP blocks run in `hf_sparse` with `silu`." in text
    assert "exactly zero" not in text
    assert read(text)["tags"] == ["hf_sparse", "activation-sparsity"]


def test_a_class_from_elsewhere_is_not_said_to_be_in_transformers(patched) -> None:
    patched.__class__ = type("OwnLlama", (type(patched),), {"__module__": "somewhere"})
    text = card(patched)
    assert "model = OwnLlama.from_pretrained" in text
    assert "# OwnLlama is no class of transformers: import it from where it is" in text
    assert "trust_remote_code" not in text


def test_a_card_written_twice_is_the_same(patched) -> None:
    first = card(patched, report=report(patched), evaluated_on="x/y", speed="1x", datasets="x/y")
    assert (
        card(patched, first, report=report(patched), evaluated_on="x/y", speed="1x", datasets="x/y") == first
    )


def test_sections_stay_where_they_were_put() -> None:
    readme = f"# A\n\n{PUSHED.marked('one', 'x')}\n\nMine.\n\n{PATCH.marked('two')}\nLast.\n"
    assert PUSHED.says_of(readme) == "x"
    changed = PATCH.put(PUSHED.put(readme, PUSHED.marked("1", "y")), PATCH.marked("2"))
    assert changed == f"# A\n\n{PUSHED.marked('1', 'y')}\n\nMine.\n\n{PATCH.marked('2')}\nLast.\n"
    assert PATCH.without(PUSHED.without(readme)).split() == ["#", "A", "Mine.", "Last."]


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "# Mine\n",
        "---\n---\n# Mine\n",
        "---\nlicense: mit  # really\n\n# why\nlanguage:\n- en\ntags: [mine]\n---\n# Mine\n---\n",
        "---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n# Mine\r\n",
        "\ufeff---\nlicense: mit\n---\n# Mine\n",
        "--- \n{license: mit, tags: [mine]}\n---\n# Mine\n",
        "---\n'license': |\n  key: no\n  tags: no\n---\n# Mine\n",
    ],
)
def test_metadata_of_the_user_stay(readme) -> None:
    old = read(readme)
    text = with_metadata(readme, OURS)
    tags = [*old.get("tags", []), "hf_sparse", "relu"]
    assert read(text) == {"base_model": "a/b", "library_name": "transformers", **old, "tags": tags}
    assert text.endswith(readme.rpartition("---\n")[2] if "\r" not in readme else "---\r\n# Mine\r\n")
    assert with_metadata(text, OURS) == text
    for line in readme.splitlines():
        if line.startswith(("license", "# why", "language", "- en")):
            assert line in text.splitlines()
    assert "tags" not in without_metadata(text) or "relu" not in read(without_metadata(text))["tags"]


def test_what_the_user_named_otherwise_is_changed_only_if_it_is_given() -> None:
    readme = "---\nbase_model: c/d\n---\n"
    assert read(with_metadata(readme, OURS))["base_model"] == "c/d"
    assert read(with_metadata(readme, OURS, given=["base_model"]))["base_model"] == "a/b"


def test_results_of_others_stay_beside_ours(patched) -> None:
    metric = {"type": "accuracy", "value": 0.5, "name": "Accuracy"}
    theirs = {"task": {"type": "x"}, "dataset": {"type": "d", "name": "d"}, "metrics": [metric]}
    readme = f"---\n{yaml.safe_dump({'model-index': [{'name': 'n', 'results': [theirs]}]})}---\n# m\n"
    once = card(patched, readme, report=report(patched), evaluated_on="x/y")
    (entry,) = read(card(patched, once, report=report(patched), evaluated_on="x/y"))["model-index"]
    assert entry["name"] == "n"
    assert [len(result["metrics"]) for result in entry["results"]] == [1, 2]
    (entry,) = read(card(patched, once))["model-index"]
    assert entry["results"] == [theirs]


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("a: [", "are no YAML"),
        ("- a", "are no mapping, but list"),
        ("tags: 3", "tags=3"),
        ("model-index: 3", "model-index"),
        ("model-index: [a]", "model-index"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(front, said) -> None:
    with pytest.raises(ValueError, match=said):
        with_metadata(f"---\n{front}\n---\n", OURS)
