"""What users train with: checkpointing, Trainer, TRL, PEFT; as the stock model with ReLU put in by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse
from support.skips import CountSkips
from support.twins import IDS, KINDS, assert_close, by_hand, logits, stock, tokenizer, twins

DATA = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant) -> None:
    """Blocks run twice, with gradient or as if without; a skip before and between changes nothing."""
    model, reference = twins(kind)
    expected = gradients(reference.train())
    with CountSkips() as skips:
        logits(model, "torch")
    assert skips.count == 2
    model.train().activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model.enable_input_require_grads()
    with hf_sparse.backend("torch"):
        assert_close(gradients(model), expected)
    model.zero_grad()  # a weight with a gradient stays as it is
    with CountSkips() as skips:
        assert_close(logits(model.eval(), "torch"), logits(reference.eval()))
    assert skips.count == 2


def trained(model: Any, folder: Path, backend: str, *, resume: Path | None = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no"} | options,
    )
    trainer = Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:2])
    with hf_sparse.backend(backend):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.slow
def test_the_trainer_with_checkpoints_and_the_best_of_them(kind, tmp_path) -> None:
    """Checkpoints are of patched models; the best one is read back; a run goes on from one."""
    model, reference = twins(kind)
    options = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    options |= {"activation_checkpointing": True, "logging_steps": 1}
    expected = trained(reference, tmp_path / "by hand", "dense", **options)
    found = trained(model, tmp_path / "sparse", "torch", **options)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)
    del found.optimizer, found.lr_scheduler
    assert_close(logits(model.eval()), logits(reference.eval()), 1e-3)
    checkpoint = tmp_path / "sparse" / "checkpoint-2"
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert len(hf_sparse.inspect(saved).blocks) == 2
    again = trained(saved, tmp_path / "again", "torch", resume=checkpoint)
    assert losses(again)[-1] == pytest.approx(losses(expected)[-1], rel=1e-3)


class TestLora:
    """Adapters on the projections of layers, or on the parameters of experts."""

    def config(self, kind: str, *, random: bool = False, **options: Any) -> LoraConfig:
        places: dict[str, Any] = {
            "llama": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
            "opt": {"target_modules": ["q_proj", "fc1", "fc2"]},
            "mixtral": {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        }[kind]
        return LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=not random, **{**places, **options})

    def wrapped(self, kind: str, model: nn.Module, seed: int = 1, **options: Any) -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(model, self.config(kind, **options)).eval()

    def test_trained_saved_loaded_merged_and_unloaded(self, kind, tmp_path) -> None:
        model, reference = twins(kind)
        model.save_pretrained(tmp_path / "base")
        adapted = self.wrapped(kind, model), self.wrapped(kind, reference)
        for one in adapted:
            optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(2):
                logits(one.eval(), "torch")  # in between, as an evaluation
                one.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            one.eval()
        del optimizer
        expected = logits(adapted[1])
        assert not torch.allclose(expected, logits(by_hand(stock(kind))), atol=1e-2)
        assert_close(logits(adapted[0], "torch"), expected, 1e-3)

        adapted[0].save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert_close(logits(loaded, "torch"), expected, 1e-3)

        merged = loaded.merge_and_unload()
        assert_close(logits(merged, "torch"), expected, 2e-3)
        with CountSkips() as skips:
            logits(merged, "torch")
        assert skips.count == 2
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(logits(again, "torch"), expected, 2e-3)
        hf_sparse.unpatch(merged)
        assert {type(m).__module__.split(".")[0] for m in merged.modules()} <= {"torch", "transformers"}

    def test_unloaded_without_merging(self, kind) -> None:
        model, reference = twins(kind)
        expected = logits(reference)
        wrapped = self.wrapped(kind, model, random=True)
        assert not torch.allclose(logits(wrapped), expected, atol=1e-2)
        bare = wrapped.unload()
        with CountSkips() as skips:
            assert_close(logits(bare, "torch"), expected)
        assert skips.count == 2

    def test_merged_in_place_and_taken_out_again(self, kind) -> None:
        model, reference = twins(kind)
        wrapped, other = (self.wrapped(kind, one, random=True) for one in (model, reference))
        expected = logits(other)
        wrapped.merge_adapter()
        assert_close(logits(wrapped, "torch"), expected, 1e-3)
        wrapped.unmerge_adapter()
        assert_close(logits(wrapped, "torch"), expected, 1e-3)
        with wrapped.disable_adapter():
            assert_close(logits(wrapped, "torch"), logits(by_hand(stock(kind))), 1e-3)

    @pytest.mark.parametrize("first", ["patch", "peft"])
    def test_several_adapters(self, kind, first) -> None:
        if first == "patch":
            model, reference = twins(kind)
        else:
            model, reference = stock(kind), by_hand(stock(kind))
        wrapped = [self.wrapped(kind, one, random=True) for one in (model, reference)]
        for one in wrapped:
            torch.manual_seed(2)
            one.add_adapter("second", self.config(kind, random=True))
            one.eval()
        if first == "peft":
            hf_sparse.patch(wrapped[0], "relu")
        seen = []
        for name in ("default", "second", "default"):
            for one in wrapped:
                one.set_adapter(name)
            seen.append(logits(wrapped[1]))
            assert_close(logits(wrapped[0], "torch"), seen[-1])
        assert not torch.allclose(seen[0], seen[1], atol=1e-2)
        for one in wrapped:
            one.delete_adapter("default")
            one.set_adapter("second")
        assert_close(logits(wrapped[0], "torch"), seen[1])

    def test_adapters_that_transformers_adds_itself(self, kind, tmp_path) -> None:
        """``model.add_adapter``: no wrapper around the model."""
        model, reference = twins(kind)
        for one in (model, reference):
            torch.manual_seed(1)
            one.add_adapter(self.config(kind, random=True))
        expected = logits(reference)
        assert_close(logits(model, "torch"), expected)
        model.save_pretrained(tmp_path / "adapter")
        model.disable_adapters()
        assert_close(logits(model, "torch"), logits(by_hand(stock(kind))))
        model.enable_adapters()
        assert_close(logits(model, "torch"), expected)
        other, _ = twins(kind)
        other.load_adapter(str(tmp_path / "adapter"))
        assert_close(logits(other, "torch"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_trl_finetunes_with_its_sft_trainer(kind, adapter, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = [" ".join(f"w{3 + (7 * i + j) % 90}" for j in range(12)) for i in range(8)]
    data = Dataset.from_dict({"text": texts})
    found = []
    for one, backend in zip(twins(kind), ("torch", "dense"), strict=True):
        arguments = trl.SFTConfig(
            str(tmp_path / backend),
            max_steps=3,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            dataset_num_proc=1,
        )
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            one,
            arguments,
            train_dataset=data,
            eval_dataset=data.select(range(2)),
            processing_class=tokenizer(),
            peft_config=TestLora().config(kind) if adapter else None,
        )
        with hf_sparse.backend(backend):
            trainer.train()
        trainer.save_model(str(tmp_path / backend / "saved"))
        found.append((losses(trainer), logits(trainer.model.eval())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert_close(found[0][1], found[1][1], 5e-3)
    if not adapter:
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "torch" / "saved", dtype=torch.float32)
        assert len(hf_sparse.inspect(saved).blocks) == 2
        assert_close(logits(saved, "torch"), found[1][1], 5e-3)


def test_the_harness_of_language_models_scores_alike(kind) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [(" ".join(f"w{3 + i + j}" for j in range(i + 2)), f" w{20 + i} w9") for i in range(5)]
    requests = [Instance("loglikelihood", {}, one, i) for i, one in enumerate(asked)]
    prompts = [(one, {"until": ["w2"], "max_gen_toks": 5, "do_sample": False}) for one, _ in asked]
    written = [Instance("generate_until", {}, one, i) for i, one in enumerate(prompts)]
    found = []
    for one, backend in zip(twins(kind), ("torch", "dense"), strict=True):
        harness = HFLM(pretrained=one, tokenizer=tokenizer(), batch_size=2, device="cpu", max_length=32)
        with hf_sparse.backend(backend), CountSkips() as skips:
            scores = harness.loglikelihood(requests, disable_tqdm=True)
            found.append((scores, harness.generate_until(written, disable_tqdm=True)))
        assert (skips.count > 0) == (backend == "torch")
    assert [score for score, _ in found[0][0]] == pytest.approx([score for score, _ in found[1][0]], rel=1e-4)
    assert found[0][1] == found[1][1]
