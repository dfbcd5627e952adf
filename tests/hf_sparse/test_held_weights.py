"""Whoever holds weights by other means than an optimizer: lists, handles, loops, arrays, modes."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from multiprocessing import shared_memory

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import hf_sparse
from support.compiler import CPP
from support.models import tiny
from support.peek import layouts, sparse_blocks

TOKEN = torch.tensor([[5]])


def patched(**changes: object):
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=2, **changes)
    hf_sparse.patch(model, "relu")
    return model


def logits(model: nn.Module, backend: str = "torch") -> Tensor:
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(TOKEN, use_cache=False).logits


def test_perturbing_a_held_list_by_seed_and_back() -> None:
    """As forward-only training does: noise goes by strides, so these must not change in between."""
    model, before = patched(), patched().state_dict()
    parameters = list(model.parameters())

    def perturb(scale: float) -> None:
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter), alpha=scale)

    perturb(0.1)
    logits(model)
    perturb(-0.1)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=1e-6, rtol=1e-5)
    assert layouts(model) == {False}


def test_a_rollback_to_clones_and_a_fused_optimizer() -> None:
    results = []
    for skips in (False, True):
        model = patched()
        parameters = list(model.parameters())
        if skips:
            logits(model)
        clones = [p.data.clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
        for parameter, clone in zip(parameters, clones, strict=True):
            parameter.data = clone
        model(torch.arange(3, 19)[None]).logits.square().mean().backward()
        optimizer.step()
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(*results)


def test_handles_taken_before_a_skip_reach_the_weights() -> None:
    model = patched()
    held = list(model.parameters())
    logits(model)
    handles = [p.data for p in held]
    model(TOKEN).logits.sum()
    for handle in handles:
        handle.zero_()
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("walk", ["named_modules", "named_parameters", "held blocks", "held dicts"])
def test_changing_layer_by_layer_and_decoding_each_time(walk: str, backend: str) -> None:
    model = patched()
    hf_sparse.prepare(model, certify=True)
    torch.manual_seed(1)

    def change(weight: Tensor) -> None:
        weight.data.copy_(torch.randn_like(weight) * weight.std())

    logits(model, backend)
    if walk == "named_modules":
        for name, module in model.named_modules():
            if name.endswith("gate_proj"):
                change(module.weight)
            logits(model, backend)
    elif walk == "named_parameters":
        for name, parameter in model.named_parameters():
            if "gate_proj" in name:
                change(parameter)
            logits(model, backend)
    elif walk == "held blocks":
        blocks = [layer.mlp for layer in model.model.layers]
        logits(model, backend)
        for block in blocks:
            change(block.stock.gate_proj.weight)
    else:
        dicts = [layer.mlp.gate_proj._parameters for layer in model.model.layers]
        logits(model, backend)
        for own in dicts:
            change(own["weight"])
    torch.testing.assert_close(logits(model, backend), logits(model, "dense"))


@pytest.mark.parametrize("certify", [False, True])
def test_weights_in_memory_that_another_process_writes(certify: bool) -> None:
    model, arrays, blocks = patched(), [], []
    for parameter in model.parameters():
        block = shared_memory.SharedMemory(create=True, size=parameter.numel() * 4)
        array = np.ndarray(tuple(parameter.shape), dtype=np.float32, buffer=block.buf)
        array[...] = parameter.detach().numpy()
        parameter.data = torch.from_numpy(array)
        arrays.append(array)
        blocks.append(block)
    del parameter
    hf_sparse.prepare(model, certify=certify)
    logits(model)
    for array in arrays:  # the learner
        array *= -0.5
    twin = patched()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-0.5)
    torch.testing.assert_close(logits(model), logits(twin, "dense"))
    del model, array, arrays, parameter
    for block in blocks:
        with contextlib.suppress(BufferError):  # parts of the model live until the next collection
            block.close()
        block.unlink()


def test_a_forward_with_fake_tensors_leaves_the_weights() -> None:
    for lent in (False, True):
        model = patched()
        expected = logits(model, "dense")
        if lent:
            logits(model)
        (block, *_) = sparse_blocks(model)
        with torch.no_grad(), hf_sparse.backend("torch"), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert block(mode.from_tensor(torch.randn(1, 32))).shape == (1, 32)
            list(model.parameters())
        torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("lent", [False, True])
def test_forward_mode_derivatives(lent: bool, backend: str) -> None:
    (block, *_) = sparse_blocks(patched())
    x, tangent = torch.randn(2, 1, 32)
    with torch.no_grad(), hf_sparse.backend(backend):
        if lent:
            block(x)
        _, found = torch.func.jvp(block.__call__, (x,), (tangent,))
        with hf_sparse.backend("dense"):
            _, expected = torch.func.jvp(block.__call__, (x,), (tangent,))
    assert expected.any()
    torch.testing.assert_close(found, expected)


class _Halved(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output / 2 if func is F.linear else output


@pytest.mark.parametrize("what", ["nn.Linear.forward", "F.linear", "nn.ReLU.forward", "a function mode"])
def test_what_is_replaced_in_torch_itself_is_called(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    as_it_was = logits(model)
    linear = F.linear
    if what == "nn.Linear.forward":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: linear(x, self.weight.round(decimals=1)))
    elif what == "F.linear":
        monkeypatch.setattr(F, "linear", lambda *args: linear(*args) / 2)
    elif what == "nn.ReLU.forward":
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, p: p.relu().sqrt())
    if what == "a function mode":
        with _Halved():
            found, expected = logits(model), logits(model, "dense")
    else:
        found, expected = logits(model), logits(model, "dense")
    assert not torch.allclose(expected, as_it_was)
    torch.testing.assert_close(found, expected)


def test_preparing_a_model_whose_weights_are_held_says_so() -> None:
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="2 of 2 MLP blocks run dense for now: something holds"):
        hf_sparse.prepare(model)
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_sparse.prepare(model)
    assert layouts(model) == {True}


def test_a_device_mode_does_not_end_skipping() -> None:
    model = patched()
    with torch.device("cpu"):
        logits(model)
    assert layouts(model) == {True}


@pytest.mark.slow
def test_several_threads_that_look_at_once() -> None:
    model, errors, stop = patched(), [], threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                list(model.parameters())
        except Exception as error:  # shown below
            errors.append(error)

    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=look) for _ in range(3)]
    try:
        sys.setswitchinterval(1e-4)
        for thread in threads:
            thread.start()
        for _ in range(20):
            logits(model)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors
