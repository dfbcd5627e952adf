"""prepare(compile=True): generate() compiles its decode step, and everything else is as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_sparse
from hf_sparse import PatchError, compiled_step
from support.compiler import needs_compiler

IDS = torch.tensor([[5, 9, 7]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """The numbers of operators in the graphs that are compiled, by a compiler that does nothing to them."""
    found: list[int] = []

    def backend(graph, inputs):
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_step, "BACKEND", backend)
    return found


def prepared(tiny_model, **options):
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True, **options)
    return model


def eager(model, ids=IDS):
    """What it generates without."""
    other = copy.deepcopy(model)
    hf_sparse.prepare(other, linears=False)
    with hf_sparse.backend("dense"):
        return other.generate(ids, **SETTINGS)


def test_the_step_is_one_graph_that_is_compiled_once(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    expected = eager(model)
    assert graphs == []
    for _ in range(2):
        assert torch.equal(model.generate(IDS, **SETTINGS), expected)
    assert len(graphs) == 1


@needs_compiler
@pytest.mark.parametrize("certify", [False, True])
def test_kernels_run_in_it(tiny_model, graphs, certify) -> None:
    model = prepared(tiny_model, certify=certify)
    with hf_sparse.backend("cpp"):
        assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))
    assert len(graphs) == 1


def test_weights_that_change_count(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    before = model.generate(IDS, **SETTINGS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    after = model.generate(IDS, **SETTINGS)
    assert not torch.equal(before, after)
    assert torch.equal(after, eager(model))


def test_a_copy_runs_on_its_own_weights(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    before = model.generate(IDS, **SETTINGS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(twin.generate(IDS, **SETTINGS), eager(twin))
    assert torch.equal(model.generate(IDS, **SETTINGS), before)


def test_a_patch_that_changes_counts(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    model.generate(IDS, **SETTINGS)
    hf_sparse.patch(model, "shifted_relu", shift=0.5)
    assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))
    assert len(graphs) == 2


@pytest.mark.parametrize("end", ["unpatch", "prepare"])
def test_it_ends(tiny_model, graphs, end) -> None:
    model = tiny_model("llama")
    former = model.generation_config.to_dict()
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True)
    hf_sparse.prepare(model, compile=True)
    model.generate(IDS, **SETTINGS)
    if end == "unpatch":
        hf_sparse.unpatch(model)
    else:
        hf_sparse.prepare(model)
    assert model.generation_config.to_dict() == former
    assert not {"_compiled_call", "_last_compile_config"} & vars(model).keys()
    graphs.clear()
    model.generate(IDS, **SETTINGS)
    assert graphs == []


def test_nothing_of_it_is_saved(tiny_model, graphs, tmp_path) -> None:
    model = prepared(tiny_model)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.cache_implementation is None
    assert model.generation_config.cache_implementation == "static"
    model.generate(IDS, **SETTINGS)
    assert len(graphs) == 1


def test_sampling_batches_and_other_lengths(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    two = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
    assert torch.equal(model.generate(two, **SETTINGS), eager(model, two))
    assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))
    torch.manual_seed(0)
    assert model.generate(IDS, max_new_tokens=6, do_sample=True).shape == (1, 9)


def test_under_an_adapter(tiny_model, graphs) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    hf_sparse.prepare(model, compile=True)
    compiled = model.generate(input_ids=IDS, **SETTINGS)
    assert len(graphs) == 1
    hf_sparse.prepare(model)
    assert torch.equal(model.generate(input_ids=IDS, **SETTINGS), compiled)


def test_a_model_that_cannot_is_refused_and_left(tiny_model) -> None:
    model = tiny_model("bert")
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match="compile=True is for models that generate"):
        hf_sparse.prepare(model, compile=True)


@pytest.mark.slow
@needs_compiler
def test_compiled_by_inductor(tiny_model) -> None:
    torch._dynamo.reset()
    model = prepared(tiny_model)
    with hf_sparse.backend("cpp"):
        assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))
