"""SparsityCallback in transformers.Trainer, against plain loops and other ways to cut a batch."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerCallback

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.methods import ActingTogether, Training, read_methods
from hf_sparse.metrics import measure
from support.callback_training import DISTRIBUTED, METHODS, Pull, models, run, sequences, trainer
from support.runs import run_on_two

PADDED = (12, 5, 9)


def assert_same(one, other, rtol=1e-4, atol=2e-5):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_trains_as_a_plain_loop_with_the_same_methods(tmp_path):
    """Of eight sequences in batches of eight, whose order is all that differs."""
    weights, log = run(trainer(tmp_path, METHODS, examples=8))

    model, dense = models()
    methods = read_methods(METHODS)
    acting = ActingTogether(methods, Training(model, 4, dense=lambda: dense))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    batch = {
        name: torch.tensor([row[name] for row in sequences(8, (12,))]) for name in ("input_ids", "labels")
    }
    logged = []
    for step in range(1, 5):
        acting.before_step(step)
        output = model(**batch)
        terms = acting.loss(step, batch, output)
        loss = acting.task_weight(step) * output.loss
        loss = loss + sum(term.weight * term.value for term in terms.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        acting.after_step(step)
        values = {
            "task_loss": output.loss,
            "loss": loss,
            **{name: term.value for name, term in terms.items()},
        }
        logged.append({name: value.item() for name, value in values.items()})
    assert_same(weights, {name: p.detach() for name, p in model.named_parameters()})

    records = [record for record in log if "loss" in record]
    for record, pair in zip(records, (logged[:2], logged[2:]), strict=True):
        for name in ("loss", "task_loss", "l1", "distillation"):
            assert record[name] == pytest.approx(sum(values[name] for values in pair) / 2, rel=1e-4), name
    assert [record["mix"] for record in records] == [1.0, 1.0]
    assert [record["l1_coefficient"] for record in records] == [2.0, 8.0]


def smoothed(outputs, labels, num_items_in_batch=None):
    """A loss of the user's, of a kind that has no place in the output of the model."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), label_smoothing=0.2, reduction="sum"
    )
    return loss / num_items_in_batch


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("loss of the model", (12,)),
        ("loss of the model", PADDED),
        ("label smoothing", PADDED),
        ("function of the user", PADDED),
        ("mean of each micro-batch", (12,)),
    ],
)
def test_a_batch_may_be_accumulated(tmp_path, kind, lengths):
    options = {"compute_loss_func": smoothed} if kind == "function of the user" else {}
    arguments = {"label_smoothing_factor": 0.2} if kind == "label smoothing" else {}
    # Padding of the penalty is of the micro-batch, so only what is over predicted tokens is compared there.
    methods = METHODS if len(lengths) == 1 else {"distillation": {"task": 0.5}}

    def trained(**batch):
        made = trainer(tmp_path, methods, lengths=lengths, options=options, **arguments, **batch)
        made.model_accepts_loss_kwargs &= kind != "mean of each micro-batch"
        return run(made)

    whole, log = trained()
    pieces, log_2 = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(whole, pieces)
    for one, two in zip(log, log_2, strict=True):
        for name in {"loss", "task_loss", "distillation", "l1", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
    record = log[-2]
    added = record["distillation"] + (record["l1_coefficient"] * record["l1"] if "l1" in record else 0)
    assert added > 1e-4
    if len(lengths) > 1:
        assert record["loss"] == pytest.approx(0.5 * record["task_loss"] + added, rel=1e-4)


def test_a_last_update_of_fewer_batches_gives_terms_their_weight(tmp_path):
    """Three batches in an epoch, two in an update: every second update has one."""
    batch = {"examples": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, log = run(trainer(tmp_path, [Pull()], logging_steps=1, learning_rate=0.0, max_grad_norm=0.0, **batch))
    pulls = [record["pull"] for record in log if "pull" in record]
    assert len(pulls) == 4
    assert pulls == pytest.approx([32.0] * 4)  # of weights that are one
    added = [record["loss"] - record["task_loss"] for record in log if "pull" in record]
    assert added == pytest.approx([0.0, 3.2, 6.4, 9.6], abs=1e-4)


def test_a_continued_training_ends_with_the_same_bits(tmp_path):
    methods = [*read_methods(METHODS), Pull()]
    saving = {"save_strategy": "steps", "save_steps": 2, "lengths": PADDED}
    whole, log = run(trainer(tmp_path / "whole", methods, **saving))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][
        "SparsityCallback"
    ]
    assert saved["attributes"]["methods_state"] == {"pull": {"weight": 0.2}}
    assert saved["args"]["methods"]["mixing"] == {"until": 0.5}

    continued = trainer(tmp_path / "continued", methods, **saving)
    weights, log_2 = run(continued, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert {k: v for k, v in log_2[1].items() if k != "epoch"} == {
        k: v for k, v in log[1].items() if k != "epoch"
    }

    with pytest.raises(ValueError, match="state of methods that are not given now: pull"):
        trainer(tmp_path / "x", METHODS).train(resume_from_checkpoint=str(checkpoint))
    other = [*read_methods({**METHODS, "mixing": {"until": 0.9}}), Pull()]
    with pytest.warns(UserWarning, match="other methods or fields: mixing"):
        trainer(tmp_path / "x", other).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_from_before_the_callback_is_continued_from(tmp_path):
    plain = trainer(tmp_path / "plain", METHODS, save_strategy="steps", save_steps=2)
    plain.remove_callback(hf_sparse.SparsityCallback)
    plain.train()
    saving = trainer(tmp_path / "more", [Pull()], save_strategy="steps", save_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        saving.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    state = json.loads((tmp_path / "more" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (
        state["stateful_callbacks"]["SparsityCallback"]["attributes"]["methods_state"]["pull"]["weight"]
        == 0.2
    )


def test_evaluations_are_of_the_model_alone_and_tell_sparsity(tmp_path):
    made = trainer(
        tmp_path, [Pull(), *read_methods(METHODS)], lengths=PADDED, evaluate=True, eval_on_start=True,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    pulling = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            (callback,) = [
                one for one in made.callback_handler.callbacks if type(one).__name__ == "SparsityCallback"
            ]
            pulling[:] = [callback._acting._acting["pull"]]

    made.add_callback(Look())
    _, log = run(made)
    found = [record for record in log if "eval_sparsity" in record]
    assert [record["step"] for record in found] == [0, 2, 4]
    (acting,) = pulling
    assert [step for step, _ in acting.reports] == [0, 2, 4]
    assert all("labels" in batch for batch in acting.batches)
    assert len(acting.batches) == 4

    rows = sequences(6, PADDED)
    batches = [
        {name: torch.tensor([row[name] for row in part]) for name in part[0]} for part in (rows[:4], rows[4:])
    ]
    expected = measure(made.model, batches)
    report = acting.reports[-1][1]
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in expected.layers]
    assert report.tokens == expected.tokens == 2 * (12 + 5 + 9)
    assert found[-1]["eval_sparsity"] == report.sparsity
    assert 0.2 < report.sparsity < 0.9
    assert report.loss == next(record["eval_loss"] for record in reversed(log) if "eval_loss" in record)
    assert made.evaluate()["eval_loss"] == report.loss  # after the training, too


def test_methods_finish_the_model_at_the_end_and_are_steered_by_evaluations(tmp_path):
    budget = {"perplexity": 50.0, "dense_perplexity": 1000.0, "by": 1.0, "lever": "l1"}
    methods = {"target_sparsity": budget, "threshold_shift": {"threshold": 0.2}}
    made = trainer(
        tmp_path, methods, lengths=PADDED, evaluate=True, eval_steps=1, max_steps=6, logging_steps=1
    )
    _, log = run(made)
    coefficients = [record["target_coefficient"] for record in log if "target_coefficient" in record]
    assert coefficients[0] == 0 < coefficients[1] < coefficients[-1]
    assert hf_sparse.inspect(made.model).config == hf_sparse.SparsityConfig.read("fatrelu", threshold=0.2)
    with pytest.raises(ValueError, match="eval_every=0 gives fewer than 4"):
        trainer(tmp_path, {"target_sparsity": budget}).train()


def test_those_that_report_get_terms_and_sparsity(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    made = trainer(tmp_path, METHODS, evaluate=True, max_steps=2)
    made.callback_handler.callbacks.insert(0, Reporter())  # where those of report_to are
    made.train()
    assert {"loss", "task_loss", "l1", "distillation", "mix", "l1_coefficient"} <= seen[0].keys()
    assert any("eval_sparsity" in logs for logs in seen)


def test_nothing_is_left_behind(tmp_path):
    made = trainer(tmp_path, METHODS, max_steps=1)
    compute = type(made).compute_loss
    made.train()
    assert made.compute_loss.__func__ is compute
    assert "compute_loss" not in vars(made)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())
    made.train()  # and it can begin anew
    assert made.state.global_step == 1


def test_a_training_that_failed_can_be_begun_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    made = trainer(tmp_path, METHODS)
    made.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.remove_callback(Interrupt)
    made.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())
    assert "compute_loss" not in vars(made)


def test_blockwise_trains_mlps_only(tmp_path):
    made = trainer(tmp_path, {"blockwise": {}})
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    weights, log = run(made)
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert all(p.requires_grad for p in made.model.parameters())
    first, last = (record for record in log if "loss" in record)
    assert first["loss"] == pytest.approx(first["blockwise"], rel=1e-5)
    assert last["blockwise"] < first["blockwise"]


def t5_config(**fields) -> T5Config:
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 64, "d_ff": 32}
    return T5Config(**sizes, decoder_start_token_id=0, **fields)


def test_an_encoder_decoder_trains_and_evaluates(tmp_path):
    config = t5_config(feed_forward_proj="gelu")
    dense = T5ForConditionalGeneration(config)
    model = copy.deepcopy(dense)
    hf_sparse.patch(model, "relu")
    row = {"input_ids": [4, 5, 6, 1, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0], "labels": [7, 8, 1, -100]}
    other = {**row, "attention_mask": [1, 1, 0, 0, 0, 0], "labels": [9, 1, -100, -100]}
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    made = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, eval_strategy="epoch", **arguments),
        train_dataset=[row] * 8,
        eval_dataset=[row, other],
        callbacks=[hf_sparse.SparsityCallback({**METHODS, "distillation": {"task": 1.0}}, dense=dense)],
    )
    _, log = run(made)
    assert log[0]["distillation"] > 0
    total = log[0]["task_loss"] + log[0]["distillation"] + 2 * log[0]["l1"]
    assert log[0]["loss"] == pytest.approx(total, rel=1e-5)
    found = next(record["eval_sparsity"] for record in reversed(log) if "eval_sparsity" in record)
    batch = {name: torch.tensor([row[name], other[name]]) for name in row}
    assert found == hf_sparse.measure(model, [batch]).sparsity


def test_an_encoder_decoder_that_gives_no_text_is_not_counted(tmp_path):
    model = T5ForSequenceClassification(t5_config(num_labels=2))
    hf_sparse.patch(model, "jsrelu")
    rows = [{"input_ids": [4, 5, 6, 1], "labels": label} for label in (0, 1)]
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    made = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=1, eval_strategy="epoch", **arguments),
        train_dataset=rows,
        eval_dataset=rows[:1],
        callbacks=[hf_sparse.SparsityCallback({})],
    )
    _, log = run(made)
    assert any("eval_loss" in record for record in log)
    assert not any("eval_sparsity" in record for record in log)


def test_restored_callbacks_continue(tmp_path):
    """As ``restore_callback_states_from_checkpoint`` has it: the Trainer makes the callback anew."""
    methods = {name: METHODS[name] for name in ("l1", "mixing")}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = run(trainer(tmp_path / "whole", methods, **saving))
    made = trainer(tmp_path / "more", methods, restore_callback_states_from_checkpoint=True, **saving)
    weights, _ = run(made, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_several_callbacks_are_refused(tmp_path):
    made = trainer(tmp_path, METHODS)
    made.add_callback(hf_sparse.SparsityCallback({"weight_noise": {}}))
    with pytest.raises(ValueError, match=r"several SparsityCallbacks .* give all methods to one"):
        made.train()


def test_thresholds_that_an_adapter_does_not_have_are_told(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(models()[0], LoraConfig(r=2, target_modules=["up_proj"]))
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    callback = hf_sparse.SparsityCallback({"target_sparsity": {"sparsity": 0.9}})
    made = Trainer(model, arguments, train_dataset=sequences(8, (12,)), callbacks=[callback])
    with pytest.warns(UserWarning, match="an adapter that is saved alone does not have it"):
        made.train()
    assert hf_sparse.inspect(model).config.activation.name == "fatrelu"


@pytest.mark.parametrize("methods", ["l1", ["l1"], None, 3])
def test_what_is_no_method_is_refused(methods):
    with pytest.raises(ValueError, match="neither a mapping of methods to their fields"):
        hf_sparse.SparsityCallback(methods)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="dense='model' is neither a model nor a function"):
        hf_sparse.SparsityCallback({"distillation": {}}, dense="model")
    with pytest.raises(ValueError, match="unknown fields in methods: l2"):
        hf_sparse.SparsityCallback({"l2": {}})
    made = trainer(tmp_path, {"distillation": {}})
    callback = next(c for c in made.callback_handler.callbacks if isinstance(c, hf_sparse.SparsityCallback))
    callback._dense = None
    with pytest.raises(ValueError, match=r"SparsityCallback a `dense`"):
        made.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())

    made = trainer(tmp_path, METHODS)
    hf_sparse.unpatch(made.model)
    with pytest.raises(ValueError, match=r"methods\.l1 has no meaning"):
        made.train()

    made = trainer(tmp_path, {"l1": {}})
    made._compute = made.compute_loss
    made.compute_loss = lambda model, inputs, num_items_in_batch=None: model.model(inputs["input_ids"])[
        0
    ].sum()
    with pytest.raises(RuntimeError, match="without a call of the model"):
        made.train()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_on_two("support.callback_training", tmp_path)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    log, refused = json.loads((tmp_path / "log.json").read_text())
    made = trainer(tmp_path / "one", METHODS, **DISTRIBUTED, gradient_accumulation_steps=4)
    expected, log_1 = run(made)
    # Adam makes a part of a step, 3e-3, of the rounding of a gradient that is next to nothing.
    assert_same(expected, weights, atol=1e-4)
    for one, two in zip(log_1, log, strict=True):
        for name in {"loss", "task_loss", "l1", "distillation", "eval_sparsity"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-4), (name, one["step"])
    # Blockwise freezes parameters for whose gradients the data parallelism of the trainer waits already.
    assert "methods freeze 15 parameters" in refused


@pytest.mark.slow
def test_trl_trains_with_it(tmp_path):
    """Whose SFTTrainer makes its loss from log-probabilities, without a loss or logits of the model."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def trained(methods, **batch):
        model, dense = models()
        made = trl.SFTTrainer(
            model,
            trl.SFTConfig(
                str(tmp_path),
                max_steps=4,
                learning_rate=3e-3,
                lr_scheduler_type="constant",
                logging_steps=2,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                **batch,
            ),
            train_dataset=Dataset.from_list(
                [{"input_ids": row["input_ids"]} for row in sequences(32, (12,))]
            ),
            processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
            callbacks=[hf_sparse.SparsityCallback(methods, dense=dense)],
        )
        return run(made)

    methods = {"l1": {"boundaries": [0.5, 1.0], "targets": [2.0, 8.0]}, "mixing": {"until": 0.5}}
    weights, log = trained(methods, per_device_train_batch_size=8)
    pieces, _ = trained(methods, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    own, _ = run(trainer(tmp_path, methods))
    assert_same(weights, pieces)
    assert_same(weights, own)
    assert log[0]["loss"] == pytest.approx(log[0]["task_loss"] + 2 * log[0]["l1"], rel=1e-4)
    with pytest.raises(ValueError, match=r"no logits.*SFTTrainer"):
        trained(METHODS, per_device_train_batch_size=8)


def test_the_best_model_has_the_thresholds_and_the_mix_that_it_was_saved_with(tmp_path):
    methods = {"target_sparsity": {"sparsity": 0.9, "by": 0.6, "start": 0.3}, "mixing": {"until": 0.3}}
    made = trainer(
        tmp_path,
        methods,
        evaluate=True,
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sparsity",
        greater_is_better=False,
    )
    with pytest.warns(UserWarning, match="was not reached"):
        made.train()
    best = Path(made.state.best_model_checkpoint)
    saved = json.loads((best / "config.json").read_text())["hf_sparse"]["activation"]
    assert best.name == "checkpoint-2"
    activation = hf_sparse.inspect(made.model).config.activation
    assert 0 < activation.mix == saved["mix"] < 1
    assert set(activation.threshold) == {0.0}
    found = made.evaluate()
    evaluations = [record for record in made.state.log_history if "eval_loss" in record]
    assert found["eval_loss"] == pytest.approx(evaluations[0]["eval_loss"], rel=1e-6)


def test_the_best_model_of_a_rising_threshold(tmp_path):
    methods = {"target_sparsity": {"sparsity": 0.9, "by": 0.6}}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_sparsity"}
    made = trainer(
        tmp_path,
        methods,
        evaluate=True,
        save_strategy="steps",
        save_steps=2,
        max_steps=8,
        greater_is_better=False,
        **best,
    )
    with pytest.warns(UserWarning, match="was not reached"):
        made.train()
    loaded = AutoModelForCausalLM.from_pretrained(made.state.best_model_checkpoint)
    config = hf_sparse.inspect(made.model).config
    assert config == hf_sparse.inspect(loaded).config
    assert max(config.activation.threshold) < 0.1
