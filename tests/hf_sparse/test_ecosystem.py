"""A patched model inside the tools that users put around models: PEFT, Accelerate, torch.compile."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model

import hf_sparse
from support.skips import CountSkips

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def lora(model: torch.nn.Module, targets: list[str] = TARGETS) -> PeftModel:
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero by default: the adapter would do nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def greedy(model: torch.nn.Module, backend: str) -> torch.Tensor:
    prompt = torch.arange(3, 9).reshape(1, -1)
    with hf_sparse.backend(backend):
        return model.generate(
            input_ids=prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits  # fmt: skip


def assert_same_logits(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-4, atol=1e-4)


class TestLoRA:
    def test_before_and_after_patching_are_the_same_model(self, tiny_model, input_ids, tmp_path) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "jsrelu")
        first = lora(model)
        first.save_pretrained(tmp_path)
        expected = first(input_ids).logits
        stock = hf_sparse.patching.transformers_model(first)
        base = type(stock)(stock.config)  # from the patched config: sparse from the start
        torch.manual_seed(0)
        wrapped = lora(tiny_model("llama"))
        report = hf_sparse.patch(wrapped, "jsrelu")
        assert len(report.blocks) == 3
        wrapped.load_state_dict(first.state_dict())
        assert torch.equal(wrapped(input_ids).logits, expected)
        base.load_state_dict(
            {k.removeprefix("base_model.model.").replace(".base_layer", ""): v
             for k, v in first.state_dict().items() if "lora_" not in k}
        )  # fmt: skip
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(input_ids).logits, expected)

    def test_decoding_uses_the_adapter(self, tiny_model) -> None:
        model = lora(tiny_model("llama"))
        hf_sparse.patch(model, "relu")
        adapted = greedy(model, "torch")
        assert_same_logits(adapted, greedy(model, "dense"))
        with model.disable_adapter():
            assert not torch.allclose(torch.stack(adapted), torch.stack(greedy(model, "torch")))

    @pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj"], ["gate_proj", "up_proj"]])
    def test_the_down_projection_skips_under_an_adapter_before_it(self, tiny_model, targets) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "relu")
        model = lora(model, targets)
        with CountSkips() as skips:
            adapted = greedy(model, "torch")
        assert skips.count == 16 * 3
        assert_same_logits(adapted, greedy(model, "dense"))

    def test_an_adapter_on_the_down_projection_runs_dense(self, tiny_model) -> None:
        model = lora(tiny_model("llama"), ["down_proj"])
        hf_sparse.patch(model, "relu")
        with CountSkips() as skips:
            adapted = greedy(model, "torch")
        assert skips.count == 0
        assert_same_logits(adapted, greedy(model, "dense"))

    def test_merged_adapter_decodes_the_same(self, tiny_model) -> None:
        model = lora(tiny_model("llama"))
        hf_sparse.patch(model, "relu")
        adapted = greedy(model, "dense")
        merged = model.merge_and_unload()
        with CountSkips() as skips:
            assert_same_logits(greedy(merged, "torch"), adapted)
        assert skips.count > 0

    def test_unpatching_keeps_the_adapter(self, tiny_model, input_ids) -> None:
        model = lora(tiny_model("llama"))
        before = model(input_ids).logits
        hf_sparse.patch(model, "relu")
        hf_sparse.unpatch(model)
        assert torch.equal(model(input_ids).logits, before)

    def test_adapter_added_after_patching_survives_unpatching(self, tiny_model, input_ids) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "original")
        wrapped = lora(model)
        before = wrapped(input_ids).logits
        hf_sparse.unpatch(wrapped)
        assert torch.equal(wrapped(input_ids).logits, before)


class TestOffload:
    @pytest.mark.parametrize("how", ["cpu", "disk"])
    def test_patching_an_offloaded_model(self, tiny_model, tmp_path, how) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "relu")
        expected = greedy(model, "dense")
        hf_sparse.unpatch(model)
        if how == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert model.model.layers[0].mlp.gate_proj.weight.is_meta
        hf_sparse.patch(model, "relu")
        with CountSkips() as skips:
            assert_same_logits(greedy(model, "torch"), expected)
        assert skips.count == 0
        hf_sparse.unpatch(model)
        remove_hook_from_module(model, recurse=True)
        assert "forward" not in vars(model.model.layers[0].mlp)

    @pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
    def test_measuring_an_offloaded_model(self, tiny_model, input_ids, tmp_path, how) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, "relu")
        mask = torch.ones_like(input_ids)
        mask[0, :5] = 0
        batch = {"input_ids": input_ids, "attention_mask": mask}
        expected = hf_sparse.measure(model, [batch])
        if how == "cpu":
            cpu_offload(model, execution_device=torch.device("cpu"))
        elif how == "disk":
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            model.save_pretrained(tmp_path / "model")
            places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu"}
            places |= {"model.rotary_emb": "cpu"}
            places |= {f"model.layers.{i}": ("cpu", "disk", "disk")[i] for i in range(3)}
            model = type(model).from_pretrained(
                tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
            )
        assert model.get_input_embeddings().weight.is_meta
        found = hf_sparse.measure(model, [batch])
        assert found.layers == expected.layers
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        tuned = hf_sparse.tune(model, [batch], tokens=(1,))
        assert [layer.density for layer in tuned.layers] == [layer.density for layer in expected.layers]
        assert all("offloaded" in str(layer.obstacle) for layer in tuned.layers[1:])

    def test_offloading_a_patched_model_and_unpatching_it(self, tiny_model) -> None:
        model = tiny_model("llama")
        expected = greedy(model, "dense")
        hf_sparse.patch(model, "relu")
        cpu_offload(model, execution_device=torch.device("cpu"))
        hf_sparse.unpatch(model)
        assert_same_logits(greedy(model, "torch"), expected)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, input_ids) -> None:
    model = tiny_model("llama").train()
    hf_sparse.patch(model, "relu")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_compiled_decoding_has_no_graph_break(tiny_model, name) -> None:
    model = tiny_model(name)
    hf_sparse.patch(model, "relu")
    mlp = model.get_submodule(hf_sparse.inspect(model).blocks[0].name)
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        expected = mlp.dense(x)
        # What is not read cannot hurt; a graph that runs dense gives NaN.
        first = mlp.get_submodule(mlp.roles.before_down[0])
        silent = first(x).flatten() <= 0
        mlp.get_submodule(mlp.roles.down).weight[:, silent] = torch.nan
        hf_sparse.prepare(model)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        with hf_sparse.backend("torch"):
            torch.testing.assert_close(compiled(x), expected)


def test_parallel_plans_still_match_the_modules(tiny_model) -> None:
    stock, model = tiny_model("llama"), tiny_model("llama")
    hf_sparse.patch(model, "jsrelu")
    assert model.tp_plan == stock.tp_plan
    names = {name for name, _ in model.named_modules()}
    mlp_rules = [rule for rule in model.tp_plan if "mlp" in rule]
    assert mlp_rules
    assert all(rule.replace("*", "0") in names for rule in mlp_rules)


@pytest.mark.slow
def test_import_adds_nothing_heavy_to_a_model_of_transformers() -> None:
    code = """
import sys, transformers.models.llama.modeling_llama
before = {name.split(".")[0] for name in sys.modules}
import hf_sparse
ours = {name.split(".")[0] for name in sys.modules} - before
import hf_sparse.cli
heavy = {"matplotlib", "datasets", "accelerate", "peft", "pandas", "tensorboard"} - before
print(*sorted(ours), *heavy.intersection(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["hf_sparse", "triton_ops"]


def test_the_example_with_the_harness_of_language_models_skips(monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval")
    example = Path(__file__).resolve().parents[2] / "examples" / "lm_eval_local_task.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--sparsity", "0.3"])
    with CountSkips() as skips:
        runpy.run_path(str(example), run_name="__main__")
    assert skips.count > 0
    told = capsys.readouterr().out
    assert "teal: sparsity 30" in told
    assert "accuracy: dense " in told
