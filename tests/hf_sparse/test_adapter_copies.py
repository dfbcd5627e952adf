"""PEFT's ``modules_to_save``: the original block and a trained copy for each adapter, in one place."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse.objectives import L1Penalty
from support.models import tiny
from support.skips import CountSkips

PLACES = [f"model.layers.{i}.mlp" for i in range(3)]


def lora(*modules: str, target: str = "q_proj") -> LoraConfig:
    return LoraConfig(r=4, target_modules=[target], modules_to_save=list(modules) or None)


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` after something like training: what requires gradient is another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny("llama")


def wrap(model: PreTrainedModel, *modules: str) -> PeftModel:
    return trained(get_peft_model(model, lora(*modules)))


def zeros(model: torch.nn.Module, input_ids: torch.Tensor) -> list[int]:
    return [layer.zeros for layer in hf_sparse.measure(model, [{"input_ids": input_ids}]).layers]


@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize(
    "modules", [("mlp",), ("layers.0",), ("layers.1", "mlp"), ("down_proj",), ("gate_proj", "up_proj")]
)
def test_each_block_counts_once_and_as_what_it_computes(base, input_ids, first, modules) -> None:
    if first == "patch":
        hf_sparse.patch(base, "relu")
        model = wrap(base, *modules)
    else:
        model = wrap(base, *modules)
        hf_sparse.patch(model, "relu")
    assert [block.place for block in hf_sparse.inspect(model).blocks] == PLACES
    found = zeros(model, input_ids)
    want = model(input_ids=input_ids).logits
    merged = model.merge_and_unload()
    assert zeros(merged, input_ids) == found
    torch.testing.assert_close(merged(input_ids=input_ids).logits, want)
    assert [block.name for block in hf_sparse.inspect(merged).blocks] == PLACES


@pytest.mark.parametrize("activation", ["relu", "fatrelu"])
def test_patched_after_peft_merged_saved_and_loaded(base, input_ids, tmp_path, activation) -> None:
    model = wrap(base, "mlp")
    hf_sparse.patch(model, activation, **({"threshold": 0.05} if activation == "fatrelu" else {}))
    want = model(input_ids=input_ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, want)
    assert hf_sparse.inspect(loaded).config == hf_sparse.inspect(merged).config
    with CountSkips() as skips, hf_sparse.backend("torch"):
        loaded.generate(input_ids=input_ids[:1], max_new_tokens=3, do_sample=False)
    assert skips.count > 0


def test_an_adapter_of_a_patched_model_is_saved_and_loaded(base, input_ids, tmp_path) -> None:
    hf_sparse.patch(base, "jsrelu")
    base.save_pretrained(tmp_path / "base")
    model = wrap(base, "mlp")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    assert zeros(again, input_ids) == zeros(model, input_ids)


class TestSeveralAdapters:
    """One with a copy of the MLPs, a second one with its own, a third one without."""

    @pytest.fixture
    def model(self, base) -> PeftModel:
        model = wrap(base, "mlp")
        model.add_adapter("second", lora("mlp"))
        model.set_adapter("second")
        trained(model)
        model.add_adapter("bare", lora())
        model.set_adapter("default")
        return model

    def test_the_active_one_is_found(self, model, input_ids) -> None:
        hf_sparse.patch(model, "relu")
        found = {}
        for name in ("default", "second", "bare"):
            model.set_adapter(name)
            found[name] = zeros(model, input_ids)
            used = hf_sparse.inspect(model).blocks[1].name
            assert used.endswith("original_module" if name == "bare" else f"modules_to_save.{name}")
        with model.disable_adapter():
            original = zeros(model, input_ids)
            assert hf_sparse.inspect(model).blocks[1].name.endswith("original_module")
        # The bare adapter's LoRA is fresh, and adds nothing.
        assert found["bare"] == original
        assert len({tuple(f) for f in found.values()}) == 3

    def test_all_are_patched_and_unpatched(self, model, input_ids) -> None:
        def logits() -> list[torch.Tensor]:
            found = []
            for name in ("default", "second", "bare"):
                model.set_adapter(name)
                found.append(model(input_ids=input_ids).logits.detach())
            with model.disable_adapter():
                found.append(model(input_ids=input_ids).logits.detach())
            return found

        stock = logits()
        model.set_adapter("second")
        hf_sparse.patch(model, "relu")
        assert all(not torch.allclose(a, b) for a, b in zip(logits(), stock, strict=True))
        model.set_adapter("default")
        hf_sparse.unpatch(model)
        assert all(map(torch.equal, logits(), stock))


def test_some_layers_and_thresholds_count_along_the_blocks(base, input_ids) -> None:
    fields = {"threshold": (0.1, 0.4), "layers": (0, 2)}
    twin = copy.deepcopy(base)
    hf_sparse.patch(twin, "fatrelu", **fields)
    model = get_peft_model(base, lora("mlp")).eval()
    hf_sparse.patch(model, "fatrelu", **fields)
    assert torch.equal(model(input_ids=input_ids).logits, twin(input_ids=input_ids).logits)


def test_the_penalty_is_of_the_copy_that_is_trained(base, input_ids) -> None:
    hf_sparse.patch(base, "relu")
    model = wrap(base, "mlp")
    with L1Penalty(model) as l1:
        model(input_ids=input_ids)
        value = l1.value()
    value.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and "gate_proj" in n]
    assert len(reached) == 3
    merged = model.merge_and_unload()
    with L1Penalty(merged) as l1:
        merged(input_ids=input_ids)
        assert l1.value().item() == pytest.approx(value.item(), rel=1e-5)
