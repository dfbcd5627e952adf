"""Training, sharding, sharing and saving find the weights as torch and transformers made them."""

from __future__ import annotations

import copy
import gc
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

import hf_sparse
from hf_sparse.modules.ownership import _in_files, is_lent, shares_nothing
from support import sharded
from support.models import tiny
from support.peek import assert_same_while_others_look, down_weight, layouts, sparse_blocks
from support.runs import environment

IDS = torch.arange(3, 35).view(2, 16)


def patched(**changes: object):
    torch.manual_seed(0)
    model = tiny("llama", **changes)
    hf_sparse.patch(model, "relu")
    return model


def skip(model) -> None:
    """One decoded token, skipping."""
    with torch.no_grad(), hf_sparse.backend("torch"):
        training = model.training
        model.eval()(IDS[:1, :1], use_cache=False)
        model.train(training)


def assert_same_weights(one, other, **tolerance: float) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


class Loop:
    """A hand-written training loop, of which each method is a habit somewhere."""

    def __init__(self, model, optimizer: str) -> None:
        make, options = OPTIMIZERS[optimizer]
        self.model = model
        self.optimizer = make(model.parameters(), lr=1e-2, **options)

    def forward(self, training: bool) -> None:
        self.model.train(training)
        self.loss = self.model(IDS, labels=IDS).loss

    def backward(self) -> None:
        self.loss.backward()

    def step(self) -> None:
        self.optimizer.step()

    def zero(self, to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)


class Third(torch.optim.Optimizer):
    """Reads a parameter, its gradient and its state as flat memory, as fused kernels do."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                flat = torch.as_strided(p, (p.numel(),), (1,))
                grad = torch.as_strided(p.grad, (p.numel(),), (1,))
                state = self.state[p].setdefault("m", torch.zeros_like(p))
                m = torch.as_strided(state, (p.numel(),), (1,))
                m.mul_(0.9).add_(grad)
                flat.sub_(group["lr"] * m)


OPTIMIZERS = {
    "loop": (torch.optim.AdamW, {"foreach": False}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "fused sgd": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "third party": (Third, {}),
}
PLACES = ("before forward", "before backward", "before step", "before zero", "at the end")


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    updates=st.lists(
        st.tuples(st.sets(st.sampled_from(PLACES)), st.booleans(), st.booleans(), st.integers(1, 2)),
        min_size=1,
        max_size=4,
    ),
)
def test_updates_are_those_of_a_run_that_never_skips(optimizer, updates) -> None:
    """Sampling anywhere in an update; training in eval mode; accumulation; gradients kept as zeros."""
    models = [patched(num_hidden_layers=2), patched(num_hidden_layers=2)]
    for model, skips in zip(models, (False, True), strict=True):
        loop = Loop(model, optimizer)
        for places, training, to_none, accumulate in updates:

            def maybe(place: str, places=places, model=model, skips=skips) -> None:
                if skips and place in places:
                    skip(model)

            for _ in range(accumulate):
                maybe("before forward")
                loop.forward(training)
                maybe("before backward")
                loop.backward()
            maybe("before step")
            loop.step()
            maybe("before zero")
            loop.zero(to_none)
            maybe("at the end")
    assert_same_weights(*models, rtol=1e-4, atol=1e-5)


def test_a_state_loaded_after_skipping_fits() -> None:
    models = [patched(), patched()]
    for model, skips in zip(models, (False, True), strict=True):
        loop = Loop(model, "fused")
        for _ in range(2):
            loop.forward(True)
            loop.backward()
            loop.step()
            loop.zero(True)
            state = copy.deepcopy(loop.optimizer.state_dict())
            if skips:
                skip(model)
            loop.optimizer.load_state_dict(state)
    assert_same_weights(*models, rtol=1e-4, atol=1e-5)


def test_the_trainer_with_its_default_optimizer_and_evaluation(tmp_path) -> None:
    """Its evaluation skips here, since the backend is forced."""
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    models = [patched(), patched()]
    for model, backend in zip(models, ("dense", "torch"), strict=True):
        arguments = TrainingArguments(
            str(tmp_path / backend),
            max_steps=3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=1,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with hf_sparse.backend(backend):
            Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2]).train()
    assert_same_weights(*models, rtol=1e-4, atol=1e-5)


SAVES = {
    "safetensors of a state dict": lambda model, path: safetensors.torch.save_file(model.state_dict(), path),
    "safetensors of a model": lambda model, path: safetensors.torch.save_model(model, str(path)),
    "safetensors of parameters": lambda model, path: safetensors.torch.save_file(
        {n: p.data for n, p in model.named_parameters()}, path
    ),
    "torch": lambda model, path: torch.save(model.state_dict(), path),
    "save_pretrained": lambda model, path: model.save_pretrained(path),
}


@pytest.mark.parametrize("way", SAVES)
def test_every_way_of_saving_after_skipping(way, tmp_path) -> None:
    model = patched(tie_word_embeddings=False)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    skip(model)
    path = tmp_path / "saved"
    SAVES[way](model, path)
    if way == "save_pretrained":
        path = path / "model.safetensors"
    found = torch.load(path) if way == "torch" else safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.is_contiguous() for value in found.values())


def one_block_for_all_layers():
    model = patched()
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    # As a model class declares it that is made so.
    model._tied_weights_keys = {
        f"model.layers.{i}.mlp.{name}.weight": f"model.layers.0.mlp.{name}.weight"
        for i in range(1, model.config.num_hidden_layers)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    return model


def test_layers_that_share_a_block_can_be_saved_after_skipping(tmp_path) -> None:
    model = one_block_for_all_layers()
    skip(model)
    assert layouts(model) == {True}
    model.save_pretrained(tmp_path)


LOOKS = {
    "parameters": lambda model: list(model.parameters()),
    "named_modules": lambda model: list(model.named_modules()),
    "an attribute": lambda model: [layer.mlp.down_proj.weight for layer in model.model.layers],
    "get_submodule": lambda model: [
        model.get_submodule(f"model.layers.{i}.mlp.down_proj") for i in range(model.config.num_hidden_layers)
    ],
    "named_children": lambda model: [list(layer.mlp.named_children()) for layer in model.model.layers],
    "apply": lambda model: model.apply(lambda module: None),
    "a state dict": lambda model: model.state_dict(),
    "a copy": lambda model: copy.deepcopy(model),
    "a pickle": lambda model: torch.save(model, io.BytesIO()),
    "training mode": lambda model: model.train().eval(),
    "a vector": lambda model: torch.nn.utils.parameters_to_vector(model.parameters()),
    "a dtype": lambda model: model.double().float(),
    "share_memory": lambda model: model.share_memory(),
    "a gradient": lambda model: model(IDS).logits.sum(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_finds_the_stock_layout_and_skipping_goes_on(look) -> None:
    model = patched()
    skip(model)
    assert layouts(model) == {True}
    expected = {n: p.detach().clone() for n, p in patched().named_parameters()}
    LOOKS[look](model)
    assert {down_weight(block).is_contiguous() for block in sparse_blocks(model)} == {True}
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    gc.collect()
    skip(model)
    # What other processes may see stays as it is.
    assert layouts(model) == {look != "share_memory"}


def test_generating_lets_nobody_look() -> None:
    """Else each call of generate() would bring every weight into the one layout and into the other."""
    model = patched()
    with hf_sparse.backend("torch"):
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False)
        addresses = [down_weight(block).data_ptr() for block in sparse_blocks(model)]
        for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}):
            model.generate(IDS[:1], max_new_tokens=3, **{"do_sample": False, **options})
            model.eval()
        assert [down_weight(block).data_ptr() for block in sparse_blocks(model)] == addresses
    assert layouts(model) == {True}


class TestSharedMemory:
    """Where somebody else holds the memory of a weight, its layout is not ours to change."""

    def test_by_a_state_dict_that_is_kept(self) -> None:
        model = patched()
        kept = model.state_dict()
        skip(model)
        assert layouts(model) == {False}
        for value in kept.values():
            value.zero_()
        assert not any(p.any() for p in model.parameters())
        del kept, value
        skip(model)
        assert layouts(model) == {True}

    def test_by_another_model(self) -> None:
        model, twin = patched(), patched()
        twin.load_state_dict(model.state_dict(), assign=True)
        skip(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not any(p.any() for p in model.parameters())

    def test_by_other_processes(self) -> None:
        model = patched().share_memory()
        skip(model)
        assert all(p.is_shared() for p in model.parameters())

    def test_by_a_view_or_an_array(self) -> None:
        weight = torch.nn.Parameter(torch.ones(4, 8))
        assert shares_nothing(weight)
        row = weight.data[0]
        assert not shares_nothing(weight)
        del row
        assert shares_nothing(weight)
        array = weight.detach().numpy()
        assert not shares_nothing(weight)
        del array
        assert not shares_nothing(torch.nn.Parameter(torch.from_numpy(np.ones(3, dtype=np.float32))))


def test_memory_that_a_file_is_mapped_to_is_told_from_that_of_others(tmp_path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * 4096))

    def mapped(shared: bool) -> torch.Tensor:
        whole = torch.UntypedStorage.from_file(str(path), shared, 4 * 4096)
        return torch.tensor([]).set_(whole[:4096])  # as safetensors does

    before = len(_in_files)
    for _ in range(40):  # at the same addresses, perhaps
        for weight, alone in (
            (mapped(False), True),
            (torch.from_numpy(np.zeros(4096, np.float32)), False),
            (mapped(True), False),
        ):
            assert [shares_nothing(weight), shares_nothing(weight)] == [alone, alone]
            view = weight[:7]
            assert not shares_nothing(weight)
            del view
    del weight
    assert shares_nothing(mapped(False))
    assert len(_in_files) < before + 4  # of the 120


def test_a_copy_of_a_model_that_skips_is_one_of_its_own() -> None:
    model = patched()
    skip(model)
    twin = copy.deepcopy(model)
    skip(twin)
    assert_same_weights(model, twin)
    skip(twin)
    with torch.no_grad():
        down_weight(next(sparse_blocks(twin))).zero_()
    assert down_weight(next(sparse_blocks(model))).any()


def test_threads_that_look_while_others_decode() -> None:
    """Each decoded token is right, whatever layout it meets."""
    model = patched(num_hidden_layers=1)
    (block,) = sparse_blocks(model)
    x = torch.randn(1, 32)
    with torch.no_grad():
        expected = block.dense(x)
        assert_same_while_others_look(model, lambda: block(x), expected)


def test_a_weight_that_is_gone_is_forgotten() -> None:
    model = patched()
    skip(model)
    weights = [id(down_weight(block)) for block in sparse_blocks(model)]
    assert all(is_lent(down_weight(block)) for block in sparse_blocks(model))
    del model
    gc.collect()
    from hf_sparse.modules import ownership

    assert not set(weights) & ownership._lent.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_training_on_two_processes_is_that_of_one(family, tmp_path) -> None:
    """Logits between updates, skipping, against one process that runs dense."""
    environments = [
        {**environment(), "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in (0, 1)
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = str(Path(__file__).parents[1]) + os.pathsep + os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "support.sharded", str(tmp_path / "logits.pt"), family],
            env={**own, "MASTER_PORT": port, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in environments
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:]
    expected = sharded.story(sharded.patched(family), sharded.IDS, "dense")
    found = torch.load(tmp_path / "logits.pt")
    assert found.keys() == sharded.WAYS.keys()
    for way, logits in found.items():
        worst = (logits - expected).abs().max()
        assert worst < 1e-3, f"{way}: logits are off by {worst}"
