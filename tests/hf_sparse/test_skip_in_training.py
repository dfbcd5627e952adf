"""Training without the silent neurons, on stock models: the losses and gradients of training dense."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.fsdp import fully_shard

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.adapters import require_blocks
from support.compiler import needs_compiler
from support.models import tiny, tiny_t5

SPARSE = {"activation": {"name": "shifted_relu", "shift": 0.5}}
IDS = torch.arange(1, 41).reshape(2, 20)

DENSE = ("mpt", "starcoder2")
"""Their blocks call the function ``dropout``, at a rate of 0 here, which may change."""

pytestmark = needs_compiler


def skipped(loss: Tensor) -> int:
    """How many blocks skipped in the forward of ``loss``."""
    seen, todo, count = set(), [loss.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            count += type(node).__name__ == "_ActiveBackward"
            todo += [following for following, _ in node.next_functions]
    return count


def twins(model: nn.Module, config: object = None) -> tuple[nn.Module, nn.Module]:
    """The patched model in training, twice."""
    hf_sparse.patch(model, config or SPARSE)
    model.train()
    return model, copy.deepcopy(model)


def assert_trains_alike(own: nn.Module, usual: nn.Module, blocks: int) -> None:
    """Loss and gradients are equal, and so many blocks skip in the one and none in the other."""
    losses = [model(IDS, labels=IDS).loss for model in (own, usual)]
    assert [skipped(loss) for loss in losses] == [blocks, 0]
    torch.testing.assert_close(losses[0], losses[1])
    for model, loss in zip((own, usual), losses, strict=True):
        model.zero_grad()
        loss.backward()
    for (name, mine), theirs in zip(own.named_parameters(), usual.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt2", "mpt", "gemma2", "starcoder2"])
def test_gradients_are_those_of_dense_training(name):
    off = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    }
    own, usual = twins(tiny(name, **off.get(name, {})))
    able = hf_sparse.skip_in_training(own, 1.0)
    assert_trains_alike(own, usual, able)
    assert able == (0 if name in DENSE else 3)


def test_encoder_and_decoder():
    own, usual = twins(tiny_t5())
    assert hf_sparse.skip_in_training(own, 1.0) == 4
    assert_trains_alike(own, usual, 4)


@pytest.mark.parametrize(
    "activation", [{"name": "drelu"}, {"name": "jsrelu"}, {"name": "cats_silu", "threshold": 0.3}]
)
def test_other_activations(activation):
    own, usual = twins(tiny("llama"), {"activation": activation})
    assert hf_sparse.skip_in_training(own, 1.0) == 3
    assert_trains_alike(own, usual, 3)


def test_zeroth_biases_are_around_it():
    own, usual = twins(tiny("llama"), {**SPARSE, "zeroth_bias": {"positions": 64}})
    assert hf_sparse.skip_in_training(own, 1.0) == 3
    assert_trains_alike(own, usual, 3)


def test_a_block_skips_where_few_are_active():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 0.0001)
    assert_trains_alike(own, usual, 0)
    for parameter in own.model.layers[1].mlp.gate_proj.parameters():
        parameter.data.mul_(1e-3)
    usual.load_state_dict(own.state_dict())
    assert_trains_alike(own, usual, 1)


def test_a_dropout_in_the_block_is_kept():
    model = tiny_t5(dropout_rate=0.1)
    hf_sparse.patch(model, SPARSE)
    assert hf_sparse.skip_in_training(model.train(), 1.0) == 0
    assert skipped(model(IDS, labels=IDS).loss) == 0
    model.eval()  # with gradient, and nothing dropped
    assert skipped(model(IDS, labels=IDS).loss) == 4


def test_who_looks_inside_sees_every_neuron():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    seen: list[Tensor] = []
    block = require_blocks(own)[0][1]
    handle = block.watch("h", lambda h, _: seen.append(h.detach()))
    assert_trains_alike(own, usual, 2)
    assert seen[0].shape == (2, 20, 88)
    handle.remove()
    assert_trains_alike(own, usual, 3)


@pytest.mark.parametrize("name", ["down_proj", "act_fn", "gate_proj"])
def test_hooks_on_gradients_in_a_block_are_called(name):
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        model.model.layers[1].mlp.get_submodule(name).register_full_backward_hook(
            lambda module, grad_input, grad_output: tuple(2 * grad for grad in grad_input)
        )
    assert_trains_alike(own, usual, 2)


def test_hooks_on_the_gradients_of_all_modules_are_called():
    own, _ = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    seen = []
    handle = torch.nn.modules.module.register_module_full_backward_hook(
        lambda module, grad_input, grad_output: seen.append(type(module).__name__)
    )
    try:
        own(IDS, labels=IDS).loss.backward()
    finally:
        handle.remove()
    assert seen.count("Linear") == 3 * 7 + 1


def test_a_learned_threshold_gets_its_gradient():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        model.model.layers[0].mlp.act_fn.shift = nn.Parameter(torch.full((88,), 0.5))
    assert_trains_alike(own, usual, 2)
    assert own.model.layers[0].mlp.act_fn.shift.grad.any()


def test_blocks_of_one_weight_and_two_backward_passes():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert_trains_alike(own, usual, 3)
    grads = []
    for model in (own, usual):
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_under_fsdp2_the_gathered_weights_are_read():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for layer in own.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(own)
    for _ in range(2):
        for model, blocks in ((own, 3), (usual, 0)):
            model.zero_grad()
            loss = model(IDS, labels=IDS).loss
            assert skipped(loss) == blocks
            loss.backward()
        for mine, theirs in zip(own.parameters(), usual.parameters(), strict=True):
            error = (mine.grad.full_tensor() - theirs.grad).abs().max()
            assert error < 1e-4 * theirs.grad.abs().max()
        with torch.no_grad():
            for parameter in (*own.parameters(), *usual.parameters()):
                parameter.sub_(parameter.grad, alpha=1e-3)


class Reduced(torch.autograd.Function):
    """What has its gradient summed over processes, as tensor parallelism does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad, "sum", dist.group.WORLD)


@pytest.mark.usefixtures("one_process")
def test_a_gradient_that_is_still_on_its_way():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, y: Reduced.apply(y))
    assert_trains_alike(own, usual, 3)


def test_it_is_told_that_nothing_can_skip():
    model = tiny("llama")
    hf_sparse.patch(model, SPARSE)
    assert hf_sparse.skip_in_training(model, 0) == 0
    with hf_sparse.backend("dense"):
        assert hf_sparse.skip_in_training(model, 0.1) == 0
    assert hf_sparse.skip_in_training(model.double(), 0.1) == 0


def test_under_lora_the_layers_are_called():
    own, usual = twins(tiny("llama"))
    assert hf_sparse.skip_in_training(own, 1.0) == 3
    models = []
    for model in (own, usual):
        torch.manual_seed(0)
        models.append(get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False)))
    assert hf_sparse.skip_in_training(models[0], 1.0) == 0
    assert_trains_alike(*models, 0)


def test_gradient_checkpointing():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_trains_alike(own, usual, 3)


def test_frozen_weights():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    for model in (own, usual):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("down_proj" in name or "embed" in name)
    assert_trains_alike(own, usual, 3)


def test_under_autocast():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    losses = []
    for model in (own, usual):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
    assert skipped(losses[0]) == 3
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    for mine, theirs in zip(own.parameters(), usual.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), 0) > 0.99


def test_updates_lead_to_the_same_weights():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    losses = []
    for model in (own, usual):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    own.eval()
    usual.eval()
    with torch.no_grad():
        torch.testing.assert_close(own(IDS).logits, usual(IDS).logits, rtol=1e-2, atol=1e-2)


def test_compiled_training_is_dense():
    own, usual = twins(tiny("llama", num_hidden_layers=1))
    hf_sparse.skip_in_training(own, 1.0)
    assert_trains_alike(torch.compile(own, backend="aot_eager"), usual, 0)


def test_it_is_no_part_of_what_is_saved(tmp_path):
    model = tiny("llama")
    hf_sparse.patch(model, SPARSE)
    before = copy.deepcopy(model.config.hf_sparse)
    hf_sparse.skip_in_training(model, 1.0)
    model.save_pretrained(tmp_path)
    assert model.config.hf_sparse == before
    again = type(model).from_pretrained(tmp_path).train()
    assert skipped(again(IDS, labels=IDS).loss) == 0
    hf_sparse.unpatch(model)
    assert skipped(model.train()(IDS, labels=IDS).loss) == 0


def test_zero_ends_it():
    own, usual = twins(tiny("llama"))
    hf_sparse.skip_in_training(own, 1.0)
    hf_sparse.skip_in_training(own, 0)
    assert_trains_alike(own, usual, 0)


def test_wrong_arguments_are_refused():
    model = tiny("llama")
    with pytest.raises(PatchError, match="not patched"):
        hf_sparse.skip_in_training(model)
    hf_sparse.patch(model, SPARSE)
    with pytest.raises(ValueError, match=r"max_density=1\.5"):
        hf_sparse.skip_in_training(model, 1.5)
