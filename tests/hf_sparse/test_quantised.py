"""Quantised models: their layers are called as what they are, and what is patched is saved and loaded so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_sparse
from hf_sparse.modules import SparseLinear
from support.gguf_files import write_gguf
from support.skips import CountSkips
from support.twins import IDS, KINDS, assert_close, by_hand, logits, stock, twins

HEADS = {"head_dim": 16, "num_key_value_heads": 4}
SIZES = {  # blocks of 64 weights have a scale each
    "llama": {"hidden_size": 64, "intermediate_size": 128, **HEADS},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128, **HEADS},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


def torchao() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**options: Any) -> Callable[[], BitsAndBytesConfig]:
    def made() -> BitsAndBytesConfig:
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**options)

    return made


QUANTISED: dict[str, Callable[[], Any]] = {
    "torchao int8": torchao,
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def skips(model: nn.Module, expected: torch.Tensor) -> int:
    with CountSkips() as counted:
        assert_close(logits(model, "torch"), expected, 1e-3)
    return counted.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", QUANTISED)
def test_quantised_and_patched_in_any_order(kind, way, tmp_path) -> None:
    """Layers run as they are, so nothing skips but experts, which are parameters and not quantised here."""
    make = QUANTISED[way]
    options = {"quantization_config": make(), "device_map": "cpu"}
    model, reference = twins(kind, **SIZES[kind])
    model.save_pretrained(tmp_path / "sparse")
    stock(kind, **SIZES[kind]).save_pretrained(tmp_path / "stock")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **options)
    expected = logits(by_hand(plain))
    assert not torch.allclose(expected, logits(reference), atol=1e-3)  # it is quantised

    classes = downs(plain, kind)
    count = 2 if kind == "mixtral" else 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **options)
    assert downs(loaded, kind) == classes
    assert skips(loaded, expected) == count
    hf_sparse.patch(plain, "relu")
    assert skips(plain, expected) == count

    # A fresh one: on the CPU, bitsandbytes stores its weights in another way once they have run.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **options)
    loaded.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert len(hf_sparse.inspect(again).blocks) == 2
    assert skips(again, expected) == count
    hf_sparse.unpatch(again)
    assert downs(again, kind) == classes


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_quantised_base(kind, tmp_path) -> None:
    options = {"quantization_config": QUANTISED["bitsandbytes nf4"](), "device_map": "cpu"}
    twins(kind, **SIZES[kind])[0].save_pretrained(tmp_path / "sparse")
    stock(kind, **SIZES[kind]).save_pretrained(tmp_path / "stock")
    layers = {"llama": ["gate_proj", "down_proj"], "mixtral": [], "opt": ["fc1", "fc2"]}
    found = []
    for name in ("sparse", "stock"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
        base = prepare_model_for_kbit_training(base if name == "sparse" else by_hand(base))
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", *layers[kind]])
        model = get_peft_model(base, adapter)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del optimizer
        found.append(logits(model.eval(), "torch"))
    assert_close(found[0], found[1], 1e-3)


def downs(model: PreTrainedModel, kind: str) -> list[tuple[str, str]]:
    """What the down projections are, of what tensors."""
    found = []
    for layer in (model.model.decoder if kind == "opt" else model.model).layers:
        if kind != "mixtral":
            down = layer.fc2 if kind == "opt" else layer.mlp.down_proj
            name = "Linear" if isinstance(down, SparseLinear) else type(down).__name__
            found.append((name, type(down.weight).__name__))
    return found


class TestQuantizersOfTransformers:
    """Without a package: one that looks for the very class ``nn.Linear``, as several do."""

    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    class Quantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = False
        left = ""

        def is_serializable(self, *_: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and name != self.left:
                    other = TestQuantizersOfTransformers.Halved(
                        module.in_features, module.out_features, module.bias is not None
                    )
                    other.load_state_dict(module.state_dict())
                    model.set_submodule(name, other)

    @pytest.mark.parametrize("left", ["", "model.decoder.layers.1.fc2"])
    def test_find_the_down_projections_of_modules_that_stay(self, left, monkeypatch) -> None:
        model, reference = twins("opt")
        quantizer = self.Quantizer(QuantizationConfigMixin(quant_method="bitsandbytes"))  # type: ignore[arg-type]
        quantizer.left = left
        for one in (model, reference):
            quantizer.preprocess_model(one)
        fc2 = [layer.fc2 for layer in model.model.decoder.layers]
        assert [type(one) for one in fc2] == [self.Halved, SparseLinear if left else self.Halved]
        del fc2
        assert skips(model, logits(reference)) == bool(left)
        assert len(hf_sparse.inspect(model).blocks) == 2


class TestGguf:
    """What was a GGUF file is plain weights in memory, if it was unpacked."""

    @pytest.fixture(params=[False, True], ids=["float", "packed"])
    def folder(self, request, tmp_path) -> Path:
        pytest.importorskip("gguf")
        sizes = {"hidden_size": 32, "intermediate_size": 96}  # blocks of 32
        write_gguf(stock("llama", **sizes), tmp_path / "model.gguf", packed=request.param)
        return tmp_path

    def load(self, folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)

    def test_patched_trained_and_saved(self, folder) -> None:
        from transformers import Trainer, TrainingArguments

        model = self.load(folder)
        expected = logits(by_hand(model))
        assert model.is_quantized  # so says transformers
        with pytest.raises(ValueError, match="quantized with gguf and is not serializable"):
            model.save_pretrained(folder / "stock")
        hf_sparse.patch(model, "relu")
        assert skips(model, expected) == 0  # an array of numpy's holds the memory
        model.save_pretrained(folder / "sparse")
        assert "quantization_config" not in model.config.to_dict()
        loaded = AutoModelForCausalLM.from_pretrained(folder / "sparse")
        assert torch.equal(logits(loaded), expected)
        assert skips(loaded, expected) == 2
        assert os.path.getsize(folder / "sparse" / "model.safetensors") > 4 * loaded.num_parameters()

        arguments = TrainingArguments(
            str(folder / "run"),
            max_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
        assert not torch.equal(logits(model.eval()), expected)

    def test_a_patch_that_fails_leaves_the_mark(self, folder) -> None:
        model = self.load(folder)
        with pytest.raises(hf_sparse.PatchError):
            hf_sparse.patch(model, "relu", layers=[7])
        assert model.is_quantized

    def test_weights_that_are_packed_keep_it(self, folder) -> None:
        """As on a machine with kernels for them, where they stay packed."""
        from transformers.integrations.gguf.utils import GgufLinear

        model = self.load(folder)
        with torch.device("cpu"):
            model.model.layers[0].self_attn.o_proj = GgufLinear(32, 32, 8)
        hf_sparse.patch(model, "relu")
        assert model.is_quantized
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(folder / "sparse")
