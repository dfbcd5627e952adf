"""What a saved model's README says, and what of a README is left alone."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.model_card import write_model_card
from support.loopback_hub import LoopbackHub

USERS = "---\nlicense: mit\n---\r\n# Caf\xe9\r\n\nMine, in Latin 1.\n\n".encode("latin-1")


def card(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_stock_model_gets_none(tiny_model, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("activation", "plain", "warns"),
    [
        ("relu", "right, computes all neurons", True),
        ("jsrelu", "refuses to load it: `KeyError: 'hf_sparse'`", True),
        ("original", "right, computes all neurons", False),
    ],
)
def test_it_says_what_is_right_where(tiny_model, tmp_path, activation, plain, warns) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, activation)
    model.save_pretrained(tmp_path)
    said = card(tmp_path)
    assert f"| transformers alone | {plain} |" in said
    assert str(hf_sparse.inspect(model)) in said
    for runtime in ("llama.cpp", "Liger", "vLLM"):
        assert (runtime in said) == warns
    assert ("**wrong without an error**: computes `silu`" in said) == warns
    assert ModelCard(said).data.to_dict() == {"library_name": "transformers", "tags": ["hf_sparse"]}


def test_it_is_the_same_after_loading_and_saving(tiny_model, tmp_path) -> None:
    model = tiny_model("gpt_neox")
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert card(tmp_path / "a") == card(tmp_path / "b")


def test_of_a_readme_that_is_there_nothing_else_changes(tiny_model, tmp_path) -> None:
    model, path = tiny_model("llama"), tmp_path / "README.md"
    path.write_bytes(USERS)
    model.save_pretrained(tmp_path)
    assert path.read_bytes() == USERS
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    once = path.read_bytes()
    assert once.startswith(USERS.rstrip())
    model.save_pretrained(tmp_path)
    assert path.read_bytes() == once
    path.write_bytes(once + b"More of mine.\n")
    hf_sparse.patch(model, "jsrelu")
    model.save_pretrained(tmp_path)
    changed = path.read_bytes()
    assert b"jsrelu" in changed
    assert b"-> relu" not in changed
    assert b"More of mine." in changed
    hf_sparse.unpatch(model)
    model.save_pretrained(tmp_path)
    assert path.read_bytes().split() == (USERS + b"More of mine.").split()


def test_a_cut_section_takes_no_text_of_the_user_with_it(tiny_model, tmp_path) -> None:
    model, path = tiny_model("llama"), tmp_path / "README.md"
    hf_sparse.patch(model, "relu")
    begin = write_model_card(model, tmp_path).read_text().split("## Sparse")[0]
    path.write_text(f"{begin}\nBetween.\n")  # begins, and never ends
    for _ in range(2):
        write_model_card(model, tmp_path)
    assert "Between." in card(tmp_path)
    assert card(tmp_path).count("## Sparse activations") == 1


def test_unpatched_again_a_readme_of_ours_goes(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path)
    hf_sparse.unpatch(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_other_processes_leave_it_to_the_main_one(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model.save_pretrained(tmp_path, False)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


PUSH = """
import sys, hf_sparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
hf_sparse.patch(model, "relu")
model.push_to_hub("me/pushed", tags=["mine"])
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/saved")
hf_sparse.patch(model, "jsrelu")
model.push_to_hub("me/saved")
"""


@pytest.mark.slow
def test_it_is_in_what_goes_to_the_hub(tiny_model, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "stock")
    with LoopbackHub() as hub:
        hub.run(PUSH, str(tmp_path / "stock"), str(tmp_path / "saved"), home=tmp_path / "author")
        pushed, saved = (hub.repositories[f"me/{name}"]["README.md"].decode() for name in ("pushed", "saved"))
    assert "silu -> relu" in pushed
    assert "llama.cpp" in pushed
    assert ModelCard(pushed).data.tags == ["mine"]
    assert "Model Card" in pushed  # transformers' own template is there, too
    assert "silu -> jsrelu" in saved
    assert "-> relu" not in saved
    assert "silu -> relu" in card(tmp_path / "saved")
