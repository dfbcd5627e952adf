"""Whole models compiled and exported, of all three kinds of block: right numbers, and what is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

import hf_sparse
from support.twins import IDS, assert_close, logits, twins


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).split(".")[1] for node in graph.nodes if "hf_sparse" in str(node.target)}


def decode(model: PreTrainedModel, step: Any) -> torch.Tensor:
    """Logits of a prompt and three tokens after it, with a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        found = [model(IDS[:1, :5], past_key_values=cache).logits]
        for i in range(5, 8):
            place = {
                "position_ids": torch.tensor([[i]])
            }  # OPT looks into the cache for it, which no graph can
            found.append(step(input_ids=IDS[:1, i : i + 1], past_key_values=cache, **place).logits)
    return torch.cat(found, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), [("llama", "dense"), ("mixtral", "torch"), ("opt", "torch")])
def test_decoding_with_a_static_cache_is_one_graph(kind, backend) -> None:
    model, reference = twins(kind, num_hidden_layers=1)
    expected = logits(reference, ids=IDS[:1, :8])
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module.graph)
        return lookup_backend("aot_eager")(module, inputs)

    torch.compiler.reset()
    counters.clear()
    with hf_sparse.backend(backend):
        hf_sparse.prepare(model)
        step = torch.compile(model.forward, fullgraph=True, backend=keep)
        assert_close(decode(model, step), expected)
    assert len(graphs) == 1
    assert not counters["graph_break"]
    name = {"llama": "gated_mlp", "mixtral": "routed_mlp", "opt": "sparse_linear"}[kind]
    assert operators(graphs[0]) == (set() if backend == "dense" else {name})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "opt"])
def test_training_compiled(kind) -> None:
    """Gradients are those of the stock model, also after the same model has skipped."""
    options = {"experts_implementation": "batched_mm"} if kind == "mixtral" else {}
    model, reference = twins(kind, num_hidden_layers=1, **options)
    logits(model, "torch")
    torch.compiler.reset()
    compiled = torch.compile(model.train(), backend="aot_eager")
    gradients = []
    for one, call in ((model, compiled), (reference.train(), reference)):
        call(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strict"), [("llama", True), ("llama", False), ("mixtral", False), ("opt", False)]
)
def test_exported(kind, strict, tmp_path) -> None:
    """An exported program holds the weights as torch stores them; where it was traced, it may skip."""
    options = {"experts_implementation": "grouped_mm"} if kind == "mixtral" else {}
    model, reference = twins(kind, num_hidden_layers=1, **options)
    expected = logits(reference)
    with torch.no_grad(), hf_sparse.backend("torch"):
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=strict)
    operator = {"llama": {"gated_mlp"}, "mixtral": set(), "opt": {"sparse_linear"}}
    assert operators(program.graph) == operator[kind]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert_close(loaded(IDS, use_cache=False).logits, expected)
    assert_close(logits(model, "torch"), expected)
