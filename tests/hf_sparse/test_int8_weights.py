"""Models that torchao has quantised to int8: kernels read their weights, and the numbers stay."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import hf_sparse
import triton_ops
from hf_sparse import SparsityConfig, compiled_step
from hf_sparse.modules import sparse_parts
from support.compiler import needs_compiler
from support.twins import IDS, assert_close, stock
from triton_ops.backends import REGISTRY
from triton_ops.cpu import operators

torchao = pytest.importorskip("torchao.quantization")
pytestmark = [needs_compiler, pytest.mark.usefixtures("own_cache")]

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {"hidden_size": 64, "intermediate_size": 128},  # gate and up projection are one layer
}
KINDS = tuple(SIZES)
MLPS = {"llama": "int8_mlp", "opt": "int8_sparse_linear", "phi3": "int8_mlp"}
"""The kernel that skips in two blocks of each kind."""
FEW = IDS[:, :8]


@pytest.fixture
def calls(monkeypatch) -> Iterator[Counter[str]]:
    """How often each kernel has run: from Python, graphs included."""
    count: Counter[str] = Counter()
    found = REGISTRY["cpp"]

    def counted(name: str) -> Any:
        def call(*args: Any) -> Tensor:
            count[name] += 1
            return getattr(found, name)(*args)

        return call

    names = ("int8_mlp", "int8_linear", "int8_sparse_linear")
    kernels: dict[str, Any] = {name: counted(name) for name in names}
    monkeypatch.setitem(REGISTRY, "cpp", replace(found, native=lambda: False, **kernels))
    triton_ops.forget()
    yield count
    monkeypatch.undo()
    triton_ops.forget()


def quantised(kind: str, **changes: Any) -> PreTrainedModel:
    model = stock(kind, **SIZES[kind], **changes)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def logits(model: nn.Module, ids: Tensor = FEW, backend: str = "auto") -> Tensor:
    with torch.inference_mode(), hf_sparse.backend(backend):
        return model(input_ids=ids, use_cache=False).logits


def down_of(model: PreTrainedModel, kind: str) -> nn.Linear:
    layers = (model.model.decoder if kind == "opt" else model.model).layers
    return layers[0].fc2 if kind == "opt" else layers[0].mlp.down_proj


@pytest.mark.parametrize("kind", KINDS)
def test_skips_as_it_is_and_multiplies_once_prepared(kind, calls) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    expected = logits(model, backend="dense")
    assert not calls
    assert_close(logits(model), expected)
    assert calls == {MLPS[kind]: 2}
    hf_sparse.prepare(model)
    calls.clear()
    assert_close(logits(model), expected)
    assert calls[MLPS[kind]] == 2
    assert calls["int8_linear"] >= 5
    assert not any(part.is_held for part in sparse_parts(model))
    # Many tokens are for torchao.
    calls.clear()
    assert_close(logits(model, IDS.repeat(2, 1)), logits(model, IDS.repeat(2, 1), "dense"))
    assert not calls
    text = str(hf_sparse.tune(model, tokens=[1]))
    assert text.count("skips at 1-32") == 2
    hf_sparse.prepare(model, linears=False)
    logits(model)
    assert calls == {MLPS[kind]: 2}
    hf_sparse.unpatch(model)
    calls.clear()
    logits(model)
    assert not calls


def test_tune_says_where_no_kernel_runs(monkeypatch) -> None:
    model = quantised("llama")
    hf_sparse.patch(model, "relu")
    with hf_sparse.backend("torch"):
        text = str(hf_sparse.tune(model, tokens=[1]))
    assert "no backend has kernels for them here in torch.float32" in text
    assert "skips" not in text.split("in the columns")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_half_precision(kind, dtype, calls) -> None:
    model = stock(kind, **SIZES[kind]).to(dtype)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    exact = stock(kind, **SIZES[kind]).to(dtype)
    torchao.quantize_(exact, torchao.Int8WeightOnlyConfig())
    for linear in [m for m in exact.modules() if isinstance(m, nn.Linear)]:
        linear.weight = nn.Parameter(linear.weight.dequantize())
    hf_sparse.patch(exact, "relu")
    exact = exact.float()
    expected = logits(exact, backend="dense")
    theirs, ours = (
        (logits(model, backend=backend).float() - expected).square().mean().sqrt()
        for backend in ("dense", "auto")
    )
    assert calls
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt() + 1e-6


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_quantised_before_or_after_and_loaded(kind, calls, tmp_path) -> None:
    options = {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig()), "device_map": "cpu"}
    model = stock(kind, **SIZES[kind])
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **options)
    expected = logits(loaded, backend="dense")
    assert_close(logits(loaded), expected)
    assert calls == {MLPS[kind]: 2}
    loaded.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    hf_sparse.prepare(again)
    calls.clear()
    assert_close(logits(again), expected)
    assert calls[MLPS[kind]] == 2
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())  # what is patched and prepared already
    calls.clear()
    assert_close(logits(model), logits(model, backend="dense"))
    assert calls[MLPS[kind]] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, calls) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with hf_sparse.backend("dense"):
        expected = model.generate(FEW, **options)
    hf_sparse.prepare(model)
    assert torch.equal(model.generate(FEW, **options), expected)
    assert calls[MLPS[kind]] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_given_back_to_whoever_looks(kind) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    logits(model)
    assert down_of(model, kind).weight.qdata.is_contiguous()
    logits(model)
    state = model.state_dict()
    assert all(value.qdata.is_contiguous() for value in state.values() if hasattr(value, "qdata"))
    del state
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    assert not any(part.is_held for part in sparse_parts(other))


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_a_weight_count_at_once(kind, calls) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    before = logits(model)
    down_of(model, kind).weight.qdata.data.neg_()
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    assert_close(after, logits(model, backend="dense"))
    with torch.no_grad():
        down_of(model, kind).weight.scale.mul_(3.0)
    assert_close(logits(model), logits(model, backend="dense"))
    assert not torch.allclose(logits(model), after, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["parameter", "rows", "layer", "view"])
def test_a_weight_that_somebody_holds_stays_as_it_is(kind, what, calls) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    take: dict[str, Any] = {
        "parameter": lambda down: down.weight,
        "rows": lambda down: down.weight.qdata,
        "layer": lambda down: down,
        "view": lambda down: down.weight.qdata[:3],
    }
    held = take[what](down_of(model, kind))
    assert_close(logits(model), logits(model, backend="dense"))
    guarded = what == "layer" and kind == "opt"  # it is ours, and tells who gets to its weight
    assert calls[MLPS[kind]] == (2 if guarded else 1)
    if what != "view":
        rows = held.weight.qdata if what == "layer" else getattr(held, "qdata", held)
        assert rows.is_contiguous()
        del rows
    del held
    calls.clear()
    logits(model)
    assert calls[MLPS[kind]] == 2


def test_kernels_get_views_of_what_may_be_stored_in_another_way(monkeypatch) -> None:
    """Another thread may store a down projection neuron by neuron while a kernel reads its rows."""
    model = quantised("llama")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    expected = logits(model, backend="dense")
    found = REGISTRY["cpp"]
    strides = []

    def late(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        if weight.rows.shape == (64, 128):
            triton_ops.neuron_major_(weight.rows)
        strides.append(weight.rows.stride())
        return found.int8_linear(x, weight, bias)

    monkeypatch.setitem(REGISTRY, "cpp", replace(found, int8_linear=late))
    triton_ops.forget()
    held = [layer.mlp.down_proj for layer in model.model.layers]  # so that all run dense
    assert_close(logits(model), expected)
    assert (1, 64) in strides
    del held
    monkeypatch.undo()
    triton_ops.forget()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_whoever_wants_calls_of_the_layers_gets_them(kind, calls) -> None:
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    expected = logits(model, backend="dense")
    seen: list[int] = []
    hook = down_of(model, kind).register_forward_hook(lambda *_: seen.append(1))
    assert_close(logits(model), expected)
    assert seen
    assert calls[MLPS[kind]] == 1
    hook.remove()
    calls.clear()
    with hf_sparse.backend("auto"), torch.no_grad():
        model.train()
        model(input_ids=FEW)
        model.eval()
    assert not calls[MLPS[kind]]
    calls.clear()
    assert_close(model(input_ids=FEW, use_cache=False).logits, expected)  # with gradient
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=FEW)
    program = torch.export.export(model, (), {"input_ids": FEW, "use_cache": False})
    assert "hf_sparse" not in str(program.graph)
    assert not calls


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_call_them(kind, calls) -> None:
    torch._dynamo.reset()
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def in_graph(ids: Tensor = FEW) -> Tensor:
        calls.clear()
        with torch.inference_mode():
            return compiled(input_ids=ids, use_cache=False).logits

    assert_close(in_graph(), logits(model, backend="dense"))
    assert calls[MLPS[kind]] == 2
    assert calls["int8_linear"] >= 5
    # More tokens are for torchao, and so is all under another backend.
    assert_close(in_graph(IDS.repeat(2, 1)), logits(model, IDS.repeat(2, 1), "dense"))
    assert not calls
    with hf_sparse.backend("torch"):
        assert_close(in_graph(), logits(model, backend="dense"))
    assert not calls
    # What somebody does to a weight counts, its layout included.
    down_of(model, kind).weight.qdata.data.neg_()
    with torch.no_grad():
        down_of(model, kind).weight.scale.mul_(3.0)
    assert_close(in_graph(), logits(model, backend="dense"))
    logits(model)  # has the layout for decoding again, where nothing holds it
    assert_close(in_graph(), logits(model, backend="dense"))
    assert calls[MLPS[kind]] >= 1


@pytest.mark.skipif(not operators.are_there(), reason="operators in C++ are not built")
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_call_operators_in_cpp(kind) -> None:
    torch._dynamo.reset()
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    called: list[object] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        found = torch.compile(model, backend=keep, fullgraph=True)(input_ids=FEW, use_cache=False).logits
    assert_close(found, logits(model, backend="dense"))
    assert called.count(getattr(torch.ops.hf_sparse, MLPS[kind]).native) == 2
    assert called.count(torch.ops.hf_sparse.int8_linear.native) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_compiled_step(kind, calls, monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_step, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled_step, "OPTIONS", {})
    model = quantised(kind)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(FEW[:1], **settings)
    hf_sparse.prepare(model, compile=True)
    calls.clear()
    assert torch.equal(model.generate(FEW[:1], **settings), expected)
    assert calls[MLPS[kind]] >= 2 * 4


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_other_kinds_of_int8_are_called(kind, calls) -> None:
    for config in (
        torchao.Int8DynamicActivationInt8WeightConfig(),
        torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)),
    ):
        model = stock(kind, **SIZES[kind])
        torchao.quantize_(model, config)
        hf_sparse.patch(model, "relu")
        hf_sparse.prepare(model)
        assert torch.equal(logits(model), logits(model, backend="dense"))
    assert not calls


def test_thresholds_on_inputs(calls) -> None:
    """As calibration by TEAL leaves it: attention and MLPs skip, layer by layer."""
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    model = stock("llama", **SIZES["llama"])
    thresholds = dict.fromkeys(names, 0.3)
    hf_sparse.patch(model, SparsityConfig(activation="original", inputs=thresholds))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = logits(model, backend="dense")
    assert_close(logits(model), expected)
    assert calls == {"int8_sparse_linear": 2 * len(names)}
    hf_sparse.prepare(model)
    assert_close(logits(model), expected)
