"""prepare(compile=True): generate() compiles its decode step, and everything else is as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

import hf_sparse
from hf_sparse import PatchError, compiled_step
from hf_sparse.modules import DecodingLinear
from support.compiler import needs_compiler
from support.every_type import model_types
from triton_ops import joined_linears

IDS = torch.tensor([[5, 9, 7]])
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """The numbers of operators in the graphs that are compiled, by a compiler that does nothing to them."""
    found: list[int] = []

    def backend(graph, inputs, **_):
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
def test_kernels_run_in_it(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
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


def test_hooks_that_come_later_are_called(tiny_model, graphs) -> None:
    model = prepared(tiny_model)
    before = model.generate(IDS, **SETTINGS)
    layer, seen = model.model.layers[1], []
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(1) or -y)
    steered = model.generate(IDS, **SETTINGS)
    assert len(seen) == SETTINGS["max_new_tokens"]
    handle.remove()
    assert not torch.equal(steered, before)
    seen.clear()
    with_all = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m) and None)
    model.generate(IDS, **SETTINGS)
    with_all.remove()
    assert seen.count(layer) == SETTINGS["max_new_tokens"]
    assert torch.equal(model.generate(IDS, **SETTINGS), before)


def test_hooks_that_come_and_go_meanwhile_are_called(tiny_model, graphs) -> None:
    """Also one that no graph could have."""
    model = prepared(tiny_model)
    before = model.generate(IDS, **SETTINGS)
    seen, handles = [], []

    def criterion(ids: Tensor, scores: None, **_: object) -> Tensor:
        if ids.shape[1] == IDS.shape[1] + 2:
            hook = model.model.layers[1].register_forward_pre_hook(
                lambda m, args: seen.append(args[0].tolist())
            )
            handles.append(hook)
        if ids.shape[1] == IDS.shape[1] + 4:
            handles.pop().remove()
        return torch.zeros(len(ids), dtype=torch.bool)

    some = StoppingCriteriaList([criterion])
    after = model.generate(IDS, stopping_criteria=some, **SETTINGS)
    assert len(seen) == 2
    assert torch.equal(after, before)


@needs_compiler
@pytest.mark.slow
def test_projections_of_the_same_tokens_are_one_call(tiny_model, monkeypatch) -> None:
    """They are compiled once, though each ``generate()`` copies the config with the pass in it."""
    torch._dynamo.reset()
    joined = []
    join = joined_linears._join
    monkeypatch.setattr(joined_linears, "_join", lambda *args: joined.append(len(args[-1])) or join(*args))
    model = prepared(tiny_model)
    with hf_sparse.backend("cpp"), torch._inductor.config.patch(fx_graph_cache=False):
        expected = eager(model)
        for _ in range(2):
            assert torch.equal(model.generate(IDS, **SETTINGS), expected)
        assert joined == [3] * model.config.num_hidden_layers


def test_fields_that_somebody_changes_are_theirs(tiny_model, graphs, tmp_path) -> None:
    model = prepared(tiny_model)
    model.generation_config.cache_implementation = "dynamic"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["cache_implementation"] == "dynamic"
    hf_sparse.unpatch(model)
    assert model.generation_config.cache_implementation == "dynamic"
    assert model.generation_config.compile_config is None

    model = prepared(tiny_model)
    model.generation_config = GenerationConfig(cache_implementation="static")
    hf_sparse.unpatch(model)
    assert model.generation_config.cache_implementation == "static"

    model = prepared(tiny_model)
    model.generation_config = None
    hf_sparse.unpatch(model)
    assert not hf_sparse.inspect(model).patched


@pytest.mark.slow
def test_experts_that_branch_on_values(graphs) -> None:
    model = model_types()["gpt_oss"].build()
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True)
    assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_that_cannot_is_refused_and_left(tiny_model, name) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    if name == "llama":
        model.generation_config = None
    before = vars(model).copy()
    with pytest.raises(PatchError, match="compile=True is for models that generate"):
        hf_sparse.prepare(model, compile=True)
    assert vars(model) == before
    assert not any(isinstance(m, DecodingLinear) for m in model.modules())


@pytest.mark.slow
@needs_compiler
def test_compiled_by_inductor(tiny_model) -> None:
    torch._dynamo.reset()
    model = prepared(tiny_model)
    with hf_sparse.backend("cpp"):
        assert torch.equal(model.generate(IDS, **SETTINGS), eager(model))
