"""hf_sparse.export to a plain checkpoint: the same function without this package, or none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.cli import main
from support.composites import composite
from support.models import tiny

PLAIN = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("The list of names")["input_ids"]
    ids, expected = torch.load(folder / "expected.pt")
    assert model.generation_config.max_length == 17, folder
    print(folder.name, len(tokens), torch.equal(model(ids).logits, expected))
assert "hf_sparse" not in sys.modules
"""

CASES = {
    "relu": lambda: patched("llama", "relu"),
    "tied": lambda: patched("gemma2", "relu"),
    "experts": lambda: patched("mixtral", "relu"),
    "inlined": lambda: patched("opt", "relu"),
    "squared": lambda: patched("gpt2", "relu2"),
    "original": lambda: patched("phi", "original"),
    "stock": lambda: tiny("llama"),
    "composite": lambda: patched(None, "relu"),
}


def patched(family, activation, **fields):
    model = composite("gemma3") if family is None else tiny(family)
    hf_sparse.patch(model, activation, **fields)
    return model


def blocks_in(folder: Path) -> int:
    return (folder / "config.json").read_text().count('"hf_sparse"')


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_transformers_alone_computes_the_same_bits(tmp_path, input_ids) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    for name, make in CASES.items():
        model = make()
        model.generation_config.max_length = 17
        with (
            torch.no_grad(),
            hf_sparse.backend("torch"),
        ):  # down projections are neuron-major when it is saved
            model(input_ids)
        expected = model(input_ids).logits
        size = "20KB" if name == "relu" else None
        folder = hf_sparse.export(model, tmp_path / name, tokenizer=tokenizer, max_shard_size=size)
        assert folder == tmp_path / name
        assert blocks_in(folder) == 0
        torch.save([input_ids, expected], folder / "expected.pt")
    assert len(list((tmp_path / "relu").glob("model-*-of-*.safetensors"))) > 2
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = len(tokenizer("The list of names")["input_ids"])
    assert done.stdout.splitlines() == [f"{name} {count} True" for name in sorted(CASES)]


def test_what_is_exported_is_no_patched_model_and_the_exported_one_is(tmp_path) -> None:
    model = patched("llama", "relu")
    model.save_pretrained(tmp_path / "patched")  # which completes its config
    config = copy.deepcopy(model.config.to_dict())
    hf_sparse.export(model, tmp_path / "out")
    assert model.config.to_dict() == config
    assert len(hf_sparse.inspect(model).blocks) == 3
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["hidden_act"] == "relu"
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert hf_sparse.inspect(loaded).config is None
    assert len(hf_sparse.inspect(loaded).blocks) == 3


def test_the_readme_names_who_gets_it_wrong_and_does_not_promise_skipping(tmp_path) -> None:
    hf_sparse.export(patched("llama", "relu"), tmp_path / "relu")
    readme = (tmp_path / "relu/README.md").read_text()
    assert "llama.cpp" in readme
    assert "import hf_sparse" not in readme
    hf_sparse.export(patched("llama", "original"), tmp_path / "original")
    assert not (tmp_path / "original/README.md").exists()


REFUSED = {
    "fatrelu": (
        lambda: patched("llama", "fatrelu", threshold=0.1),
        "fatrelu .threshold 0.1.*no activation of",
    ),
    "cats": (
        lambda: patched("llama", "cats_silu", threshold=0.1),
        "cats_silu .threshold 0.1.*no activation of",
    ),
    "drelu": (lambda: patched("llama", "drelu"), "no activation of that kind"),
    "mixed": (lambda: patched("llama", "relu", mix=0.5), "set_mix"),
    "layers": (lambda: patched("llama", "relu", layers=(0, 2)), "only 2 of its MLP blocks"),
    "topk": (
        lambda: patched("llama", "relu", topk={"share": 0.5}),
        "relu and topk .*: transformers has no topk",
    ),
    "no field": (lambda: patched("bloom", "relu"), "no field that sets it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_cannot_compute_is_refused(name, tmp_path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(hf_sparse.PatchError, match=reason):
        hf_sparse.export(make(), tmp_path / "out")
    assert left(tmp_path) == []


def test_a_change_by_hand_since_the_patch_counts(tmp_path) -> None:
    model = patched("llama", "relu")
    model.model.layers[1].mlp = tiny("llama").model.layers[1].mlp
    with pytest.raises(hf_sparse.PatchError, match="only 2 of its MLP blocks"):
        hf_sparse.export(model, tmp_path / "out")
    assert left(tmp_path) == []


def test_weights_that_were_quantised_in_memory_are_refused(tmp_path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(
        hf_sparse.PatchError, match=r"q_proj\.weight is a .*quantised .* export the model before"
    ):
        hf_sparse.export(model, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(tmp_path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").exists()
            raise OSError("no space")

    model = patched("llama", "relu")
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="no space"):
        hf_sparse.export(model, tmp_path / "out", tokenizer=Broken())
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == []
    hf_sparse.export(model, tmp_path / "out")
    assert left(tmp_path) == ["out"]
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(left(tmp_path / "out"))


def test_nothing_is_written_over(tmp_path) -> None:
    model = tiny("llama")
    (tmp_path / "notes.gguf").write_text("mine")
    for path, format in ((tmp_path, "dense"), (tmp_path / "notes.gguf", "gguf")):
        with pytest.raises(ValueError, match="never written over"):
            hf_sparse.export(model, path, format=format)
    for path, format in (("new", "gguf"), ("new.gguf", "dense")):
        with pytest.raises(ValueError, match="does not go with"):
            hf_sparse.export(model, tmp_path / path, format=format)
    with pytest.raises(ValueError, match="choose one of dense, gguf"):
        hf_sparse.export(model, tmp_path / "new", format="onnx")
    assert (tmp_path / "notes.gguf").read_text() == "mine"
    assert left(tmp_path) == ["notes.gguf"]


class TestAdapters:
    peft = pytest.importorskip("peft")

    def lora(self, model, **fields):
        targets = {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": False}
        return self.peft.get_peft_model(model, self.peft.LoraConfig(**targets, **fields)).eval()

    def test_are_merged_in_a_copy(self, tmp_path, input_ids) -> None:
        model = patched("llama", "relu")
        before = model(input_ids).logits
        wrapped = self.lora(model)
        expected = wrapped(input_ids).logits
        hf_sparse.export(wrapped, tmp_path / "out")
        loaded = type(model).from_pretrained(tmp_path / "out")
        assert blocks_in(tmp_path / "out") == 0
        torch.testing.assert_close(loaded(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (before - expected).abs().max() > 0.1
        assert torch.equal(wrapped(input_ids).logits, expected)

    def test_of_a_module_that_stays_too(self, tmp_path, input_ids) -> None:
        model = patched("opt", "relu")
        config = self.peft.LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)
        wrapped = self.peft.get_peft_model(model, config).eval()
        hf_sparse.export(wrapped, tmp_path / "out")
        loaded = type(model).from_pretrained(tmp_path / "out")
        expected = wrapped(input_ids).logits
        torch.testing.assert_close(loaded(input_ids).logits, expected, rtol=1e-4, atol=1e-4)

    def test_that_cannot_be_merged_are_refused(self, tmp_path) -> None:
        prompt = self.peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        wrapped = self.lora(patched("llama", "relu"))
        for model in (self.peft.get_peft_model(tiny("llama"), prompt), wrapped.get_base_model()):
            with pytest.raises(hf_sparse.PatchError, match="cannot be merged from here"):
                hf_sparse.export(model, tmp_path / "out")
        with wrapped.disable_adapter(), pytest.raises(hf_sparse.PatchError, match="switched off"):
            hf_sparse.export(wrapped, tmp_path / "out")
        assert left(tmp_path) == []


def test_the_command(tmp_path, capsys, input_ids) -> None:
    assert main(["patch", "tiny", "--output", str(tmp_path / "patched")]) == 0
    assert main(["export", str(tmp_path / "patched"), "--output", str(tmp_path / "plain")]) == 0
    assert f"saved in {tmp_path / 'plain'}" in capsys.readouterr().out
    assert blocks_in(tmp_path / "patched") > 0
    assert blocks_in(tmp_path / "plain") == 0
    assert (tmp_path / "plain/tokenizer.json").exists()
    arguments = ["export", "tiny", "--no-vocabulary", "--output", str(tmp_path / "other")]
    assert main(arguments) == 2
    assert "--no-vocabulary has no meaning with --format dense" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
