"""A patched model under torch.compile: one graph for the decoding step, with the operators in it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from transformers import StaticCache

import hf_sparse
from support.compiler import CPP, needs_compiler
from support.pairs import pairs

_PACKETS = torch.ops.hf_sparse.gated_mlp, torch.ops.hf_sparse.plain_mlp
OPERATORS = [overload for one in _PACKETS for overload in (one.inference, one.native)]


class Recorder:
    """A compiler backend that keeps the graphs it is given."""

    def __init__(self, backend: str) -> None:
        torch.compiler.reset()
        counters.clear()
        self.graphs: list[torch.fx.Graph] = []
        self._compile = lookup_backend(backend)

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs.append(module.graph)
        return self._compile(module, inputs)

    def operators(self) -> list[torch.fx.Node]:
        return [node for graph in self.graphs for node in graph.nodes if node.target in OPERATORS]


def decode(model, step, tokens: int = 4) -> torch.Tensor:
    """Logits ``[tokens, V]`` of ``step`` on greedy tokens after a prompt, with a static cache."""
    prompt = torch.arange(3, 8)[None]
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        logits = [model(prompt, past_key_values=cache, use_cache=True).logits[:, -1]]
        for _ in range(tokens):
            token = logits[-1].argmax(-1, keepdim=True)
            logits.append(step(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.cat(logits[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "certify", "skip"),
    pairs(["llama", "gpt_neox"], [False, True], ["torch", CPP]),
)
def test_the_decoding_step_with_a_static_cache(tiny_model, name, certify, skip) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    recorder = Recorder("aot_eager")
    with hf_sparse.backend(skip):
        hf_sparse.prepare(model, certify=certify)
        expected = decode(model, model.forward)
        compiled = decode(model, torch.compile(model.forward, fullgraph=True, backend=recorder))
    torch.testing.assert_close(compiled, expected)
    assert len(recorder.graphs) == 1
    assert not counters["graph_break"]
    place = 7 if name == "llama" else 5
    assert [node.args[place] is not None for node in recorder.operators()] == [certify] * 3


@pytest.mark.slow
@needs_compiler
def test_the_decoding_step_through_inductor(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    recorder = Recorder("inductor")
    with hf_sparse.backend("cpp"):
        hf_sparse.prepare(model, certify=True)
        expected = decode(model, model.forward)
        torch.testing.assert_close(
            decode(model, torch.compile(model.forward, fullgraph=True, backend=recorder)), expected
        )
    assert len(recorder.operators()) == 3


@needs_compiler
def test_a_graph_does_not_trust_a_certificate_of_earlier_weights(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    recorder = Recorder("aot_eager")
    compiled = torch.compile(block.module, fullgraph=True, backend=recorder)
    x = torch.randn(1, 1, 32)
    with hf_sparse.backend("cpp"), torch.no_grad():
        hf_sparse.prepare(model, certify=True)
        before = compiled(x)
        assert torch.equal(before, block.module(x))
        block.weights()[0][0].neg_()
        changed = compiled(x)
        assert not torch.equal(changed, before)
        torch.testing.assert_close(changed, block.module.dense(x))
        hf_sparse.prepare(model, certify=True)
        torch.testing.assert_close(compiled(x), changed)
    assert recorder.operators()[0].args[7] is not None


def test_training_drops_the_certificate_from_the_graph(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    recorder = Recorder("aot_eager")
    compiled = torch.compile(block.module, fullgraph=True, backend=recorder)
    x = torch.randn(1, 1, 32)
    with hf_sparse.backend("torch"), torch.no_grad():
        hf_sparse.prepare(model, certify=True)
        expected = compiled(x)
        model.train()
        torch.testing.assert_close(compiled(x), block.module.dense(x))
        model.eval()
        torch.testing.assert_close(compiled(x), expected)
    assert [node.args[7] is not None for node in recorder.operators()] == [True, False]


def test_a_measured_density_is_read_when_the_graph_is_made(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    block.module.density = 0.25
    recorder = Recorder("aot_eager")
    with hf_sparse.backend("torch"), torch.no_grad():
        hf_sparse.prepare(model)
        x = torch.randn(1, 1, 32)
        compiled = torch.compile(block.module, fullgraph=True, backend=recorder)
        torch.testing.assert_close(compiled(x), block.module.dense(x))
    assert len(recorder.operators()) == 1
