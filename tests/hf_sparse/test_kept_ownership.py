"""Down projections that stand in the model themselves: who reaches their weights finds the stock layout."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.modules.module import register_module_forward_hook

import hf_sparse
from hf_sparse.modules import SparseLinear
from hf_sparse.modules.ownership import is_lent
from support.models import tiny
from support.peek import assert_same_while_others_look, down_weight, layouts, sparse_blocks
from support.skips import CountSkips

IDS = torch.arange(3, 35).view(2, 16)


def patched(activation: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    model = tiny("opt")
    hf_sparse.patch(model, activation)
    return model


def logits(model: nn.Module, backend: str, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(ids, use_cache=False).logits


def linears(model: nn.Module) -> list[SparseLinear]:
    return [vars(layer)["_modules"]["fc2"] for layer in model.model.decoder.layers]


LOOKS = {
    "parameters": lambda model: list(model.parameters()),
    "parameters of one module": lambda model: [list(one.parameters(recurse=False)) for one in linears(model)],
    "names of one module": lambda model: [
        list(one.named_parameters(recurse=False)) for one in linears(model)
    ],
    "a state dict": lambda model: model.state_dict(),
    "a state dict of one": lambda model: [one.state_dict() for one in linears(model)],
    "an attribute": lambda model: [one.weight for one in linears(model)],
    "setting an attribute": lambda model: [setattr(one, "weight", one.weight) for one in linears(model)],
    "get_parameter": lambda model: [
        model.get_parameter(f"model.decoder.layers.{i}.fc2.weight") for i in range(3)
    ],
    "data": lambda model: [one.weight.data for one in linears(model)],
    "modules": lambda model: list(model.modules()),
    "apply": lambda model: model.apply(lambda module: getattr(module, "weight", None)),
    "a copy": lambda model: copy.deepcopy(model),
    "a shallow copy": lambda model: [copy.copy(one) for one in linears(model)],
    "a pickle": lambda model: torch.save(model, io.BytesIO()),
    "training mode": lambda model: model.train().eval(),
    "a dtype": lambda model: model.double().float(),
    "a gradient": lambda model: model(IDS).logits.sum(),
    "loading": lambda model: model.load_state_dict(model.state_dict()),
    "loading by assignment": lambda model: model.load_state_dict(
        copy.deepcopy(model.state_dict()), assign=True
    ),
    "requires_grad_": lambda model: [one.requires_grad_(True) for one in linears(model)],
    "unpatching": lambda model: (hf_sparse.unpatch(model), hf_sparse.patch(model, "relu")),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_the_stock_layout_and_skipping_goes_on(look) -> None:
    model = patched()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits(model, "torch")
    assert layouts(model) == {True}
    LOOKS[look](model)
    assert {down_weight(block).is_contiguous() for block in sparse_blocks(model)} == {True}
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters() if n in expected)
    gc.collect()
    logits(model, "torch")
    assert layouts(model) == {True}


HOLDS = {
    "an optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "a list": lambda model: [one.weight for one in linears(model)],
    "a state dict": lambda model: model.state_dict(),
    "a shallow copy": lambda model: [copy.copy(one) for one in linears(model)],
    "the stock layers": lambda model: [one._stock[0] for one in linears(model)],
    "the dicts of parameters": lambda model: [vars(one)["_parameters"] for one in linears(model)],
    "a view": lambda model: [one.weight.data[0] for one in linears(model)],
}


@pytest.mark.parametrize("hold", HOLDS)
def test_a_weight_that_somebody_holds_stays_as_it_is(hold) -> None:
    model = patched()
    held = HOLDS[hold](model)
    with CountSkips() as skips:
        logits(model, "torch")
    assert (layouts(model), skips.count) == ({False}, 0)
    with pytest.warns(UserWarning, match="3 of 3 MLP blocks run dense for now"):
        hf_sparse.prepare(model)
    del held
    hf_sparse.prepare(model)
    assert layouts(model) == {True}


def test_decoding_between_fused_updates_changes_no_update() -> None:
    results = []
    for skips in (False, True):
        model = patched().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if skips:
                logits(model.eval(), "torch")
                model.train()
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(*results)


def test_gradients_and_training_are_those_of_the_stock_model() -> None:
    model = tiny("opt", activation_function="relu")
    stock = copy.deepcopy(model)
    hf_sparse.patch(model, "relu")
    logits(model, "torch")
    for one in (model, stock):
        torch.manual_seed(0)  # dropout
        one.train()(IDS, labels=IDS).loss.backward()
    found, expected = ({n: p.grad for n, p in one.named_parameters()} for one in (model, stock))
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("hooked", ["a hook", "a pre-hook", "all modules"])
def test_a_hook_sees_the_dense_computation(hooked) -> None:
    model, seen = patched(), []
    expected = logits(model, "dense")
    if hooked == "a hook":
        handles = [one.register_forward_hook(lambda m, args, out: seen.append(out)) for one in linears(model)]
    elif hooked == "a pre-hook":
        handles = [one.register_forward_pre_hook(lambda m, args: seen.append(args)) for one in linears(model)]
    else:
        handles = [register_module_forward_hook(lambda m, args, out: seen.append(out))]
    with CountSkips() as skips:
        assert torch.equal(logits(model, "torch"), expected)
    for handle in handles:
        handle.remove()
    assert (skips.count, len(seen) >= 3) == (0, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_other_dtypes(dtype) -> None:
    model = patched()
    with torch.autocast("cpu", torch.bfloat16), CountSkips() as skips:
        torch.testing.assert_close(logits(model, "torch"), logits(model, "dense"))
    assert skips.count == 0
    model.to(dtype)
    torch.testing.assert_close(logits(model, "torch"), logits(model, "dense"), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("how", ["cpu", "disk", "a device map"])
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_models(how, first, tmp_path) -> None:
    model = tiny("opt")
    twin = copy.deepcopy(model)
    hf_sparse.patch(twin, "relu")
    expected = logits(twin, "dense")
    if first == "patch":
        hf_sparse.patch(model, "relu")
        logits(model, "torch")
    if how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if first == "offload":
        hf_sparse.patch(model, "relu")
    for backend in ("dense", "torch"):
        torch.testing.assert_close(logits(model, backend), expected, atol=1e-5, rtol=1e-4)
    hf_sparse.unpatch(model)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    hf_sparse.unpatch(twin)
    torch.testing.assert_close(logits(model, "dense"), logits(twin, "dense"))


def test_a_compiled_layer_has_the_operator_and_no_graph_break() -> None:
    model = patched()
    hf_sparse.prepare(model)
    expected = logits(model, "dense")
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(module.graph)
        return lookup_backend("aot_eager")(module, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=keep)
    with torch.no_grad(), hf_sparse.backend("torch"):
        found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (graph,) = graphs
    operator = torch.ops.hf_sparse.sparse_linear.inference
    assert sum(node.target is operator for node in graph.nodes) == 3
    assert layouts(model) == {True}


def test_threads_that_look_while_others_decode() -> None:
    model = patched()
    (one, *_) = linears(model)
    h = torch.randn(1, 88).relu()
    with torch.no_grad():
        expected = nn.functional.linear(h, one.weight, one.bias)
        assert_same_while_others_look(model, lambda: one(h), expected)


def test_what_replaces_linear_layers_in_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    as_it_was = logits(model, "torch")
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: linear(x, self.weight.round(decimals=1), self.bias)
    )
    found = logits(model, "torch")
    assert not torch.allclose(found, as_it_was)
    torch.testing.assert_close(found, logits(model, "dense"))


def test_a_model_that_is_given_up_is_freed_at_once() -> None:
    model = patched()
    logits(model, "torch")
    weights = [id(down_weight(block)) for block in sparse_blocks(model)]
    assert all(is_lent(down_weight(block)) for block in sparse_blocks(model))
    gc.disable()
    try:
        (layer, *_) = model.model.decoder.layers
        layer.fc2 = nn.Linear(88, 32)
    finally:
        gc.enable()
    from hf_sparse.modules import ownership

    assert weights[0] not in ownership._lent
    assert logits(model, "torch").isfinite().all()


def test_generating_lets_nobody_look() -> None:
    model = patched()
    with hf_sparse.backend("torch"):
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False)
        addresses = [down_weight(block).data_ptr() for block in sparse_blocks(model)]
        for options in ({}, {"do_sample": True}, {"num_beams": 2}):
            model.generate(IDS[:1], max_new_tokens=3, **{"do_sample": False, **options})
            model.eval()
        assert [down_weight(block).data_ptr() for block in sparse_blocks(model)] == addresses
    assert layouts(model) == {True}
