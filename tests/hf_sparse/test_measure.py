"""hf_sparse.measure: counts against a computation by hand, what it leaves behind, report, errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.metrics import DEFINITION, measure
from support.models import untrained_llama

TEXTS = ["Return the list of names.", "If the file does not exist, raise an error.", "x", ""] * 3


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return untrained_llama(vocab_size=1536, intermediate_size=80).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def by_hand(model, input_ids, mask=None):
    """Zeros per layer and summed loss, one token at a time, from the definition."""
    zeros, inputs = [], []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    real = torch.ones_like(input_ids) if mask is None else mask
    for h in inputs:
        zeros.append(sum(int((h[b, s] == 0).sum()) for b, s in real.nonzero().tolist()))
    pairs = [(b, s) for b, s in real.nonzero().tolist() if s > 0 and real[b, s - 1]]
    loss = sum(cross_entropy(logits[b, s - 1], input_ids[b, s]).item() for b, s in pairs)
    return zeros, loss / len(pairs), int(real.sum()), len(pairs)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_counts_and_loss_agree_with_the_definition(llama, activation, padding):
    if activation == "relu":
        hf_sparse.patch(llama, "relu")
    ids = torch.randint(5, 1500, (3, 11))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = mask[2, :9] = 0
    if padding == "right":
        mask[0, 7:] = mask[1, 3:] = 0
    batch = {"input_ids": ids} | ({} if padding == "none" else {"attention_mask": mask})
    zeros, loss, tokens, predicted = by_hand(llama, ids, None if padding == "none" else mask)

    report = hf_sparse.measure(llama, [batch])
    assert [layer.zeros for layer in report.layers] == zeros
    assert report.tokens == tokens
    assert report.predicted_tokens == predicted
    assert report.loss == pytest.approx(loss, rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert report.sparsity == pytest.approx(sum(zeros) / (3 * 80 * tokens))
    assert (report.sparsity > 0.2) == (activation == "relu")
    assert [layer.name for layer in report.layers] == [f"model.layers.{i}.mlp" for i in range(3)]


def test_padding_changes_nothing(llama):
    hf_sparse.patch(llama, "relu")
    ids = torch.randint(5, 1500, (2, 9))
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    a, b = measure(llama, alone), measure(llama, [{"input_ids": ids, "attention_mask": mask}])
    assert [x.zeros for x in a.layers] == [x.zeros for x in b.layers]
    assert a.loss == pytest.approx(b.loss, rel=1e-6)


def test_labels_restrict_the_loss_only(llama):
    ids = torch.randint(5, 1500, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    report = measure(llama, [{"input_ids": ids, "labels": labels}])
    with torch.no_grad():
        expected = llama(input_ids=ids, labels=labels).loss.item()
    assert report.loss == pytest.approx(expected, rel=1e-6)
    assert (report.tokens, report.predicted_tokens) == (18, 8)


def test_packed_documents_are_those_one_by_one(llama):
    hf_sparse.patch(llama, "relu")
    documents = [torch.randint(3, 60, (1, n)) for n in (7, 4, 9)]
    one_by_one = measure(llama, [{"input_ids": ids} for ids in documents])
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])
    packed = measure(llama, [{"input_ids": torch.cat(documents, 1), "position_ids": positions[None]}])
    assert packed.loss == pytest.approx(one_by_one.loss, rel=1e-5)
    assert packed.predicted_tokens == one_by_one.predicted_tokens == 6 + 3 + 8
    assert packed.sparsity == pytest.approx(one_by_one.sparsity, abs=1e-3)


def test_positions_are_refused_by_a_model_that_takes_none():
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64))
    ids = torch.randint(3, 60, (1, 6))
    with pytest.raises(ValueError, match="BloomForCausalLM takes none"):
        measure(model, [{"input_ids": ids, "position_ids": torch.arange(6)[None]}])


def test_texts_are_packed_and_weighted_by_tokens(llama, tokenizer):
    ids = [t for text in TEXTS if text for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    cut = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    cut = [window for window in cut if len(window) > 1]
    losses = []
    with torch.no_grad():
        for window in cut:
            row = torch.tensor([window])
            losses.append((llama(input_ids=row, labels=row).loss.item(), len(window) - 1))
    report = measure(llama, TEXTS, tokenizer=tokenizer, sequence_length=16, batch_size=2)
    assert report.tokens == sum(map(len, cut))
    assert report.sequence_length == 16
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert report.loss == pytest.approx(expected, rel=1e-6)
    rows = measure(llama, [{"text": t} for t in TEXTS], tokenizer=tokenizer, sequence_length=16)
    assert rows.loss == pytest.approx(report.loss, rel=1e-6)
    assert rows.layers == report.layers


def test_max_tokens(llama, tokenizer):
    assert measure(llama, TEXTS, tokenizer=tokenizer, sequence_length=16, max_tokens=40).tokens == 40
    endless = ({"input_ids": torch.randint(5, 1500, (2, 8))} for _ in iter(int, 1))
    assert measure(llama, endless, max_tokens=20).tokens == 32


def test_a_model_knows_its_tokenizer():
    model = LlamaForCausalLM.from_pretrained(TINY_MODEL)
    assert measure(model, ["Return the list."]).loss > 0


@pytest.mark.parametrize("activation", ["relu2", "jsrelu", "drelu"])
def test_every_backend_sees_the_same_zeros(llama, activation):
    hf_sparse.patch(llama, activation)
    batch = {"input_ids": torch.randint(5, 1500, (1, 12))}
    auto = measure(llama, [batch])
    with hf_sparse.backend("dense"):
        assert measure(llama, [batch]).layers == auto.layers


def test_plain_mlp():
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(64, (2, 8))}
    assert measure(model, [batch]).sparsity == 0
    hf_sparse.patch(model, "relu")
    report = measure(model, [batch])
    assert 0.3 < report.sparsity < 0.7
    assert [layer.neurons for layer in report.layers] == [96, 96]


def test_peft_wrapped(llama):
    peft = pytest.importorskip("peft")
    hf_sparse.patch(llama, "relu")
    batch = {"input_ids": torch.randint(5, 1500, (2, 8))}
    before = measure(llama, [batch])
    targets = ["down_proj", "up_proj", "q_proj"]
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(target_modules=targets, r=4))
    report = measure(wrapped, [batch])  # a fresh adapter adds nothing
    assert [x.zeros for x in report.layers] == [x.zeros for x in before.layers]
    assert report.loss == pytest.approx(before.loss, rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(llama, fails):
    hf_sparse.patch(llama, "relu")
    llama.train()
    llama.model.layers[1].eval()
    modes = [m.training for m in llama.modules()]
    batches = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    if fails:
        batches.append({"input_ids": torch.tensor([[1, 99_999]])})
        with pytest.raises(IndexError):
            measure(llama, batches)
    else:
        measure(llama, batches)
    assert [m.training for m in llama.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())
    llama(input_ids=batches[0]["input_ids"], labels=batches[0]["input_ids"]).loss.backward()
    assert llama.model.layers[0].mlp.down_proj.weight.grad is not None


def test_nan_is_not_silence(llama):
    hf_sparse.patch(llama, "relu")
    with torch.no_grad():
        llama.model.layers[1].mlp.gate_proj.weight.fill_(math.nan)
    report = measure(llama, [{"input_ids": torch.tensor([[1, 2, 3]])}])
    assert report.layers[0].zeros > 0
    assert report.layers[1].zeros == 0
    assert json.loads(report.to_json())["loss"] is None


def test_report_table_json_and_plot(llama, tmp_path):
    batch = [{"input_ids": torch.randint(5, 1500, (2, 8))}]
    before = measure(llama, batch)
    hf_sparse.patch(llama, "relu")
    report = measure(llama, batch)
    table = str(report)
    assert DEFINITION in table
    assert f"{report.layers[2].sparsity:.2%}" in table
    assert f"{report.sparsity:.2%}" in table

    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert data["density"] == pytest.approx(1 - data["sparsity"])
    assert data["definition"] == DEFINITION
    zeros = sum(layer["zeros"] for layer in data["layers"])
    assert data["sparsity"] == pytest.approx(zeros / (16 * 240))

    alone = report.plot(tmp_path / "alone.png").read_bytes()
    both = report.plot(tmp_path / "both.png", before=before).read_bytes()
    assert alone[:8] == both[:8] == b"\x89PNG\r\n\x1a\n"
    assert alone != both


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place", "its forward", "its blocks", "replicated"])
def test_hooks_see_what_compiled_and_replicated_models_compute(llama, how):
    hf_sparse.patch(llama, "relu")
    batch = {"input_ids": torch.randint(5, 1500, (2, 11)), "attention_mask": torch.ones(2, 11).long()}
    batch["attention_mask"][0, :4] = 0  # position_ids are passed on, too
    expected = measure(llama, [batch])
    model: torch.nn.Module = llama
    if how == "wrapped":
        model = torch.compile(llama, backend="eager")
    elif how == "in place":
        llama.compile(backend="eager")
    elif how == "its forward":
        llama.forward = torch.compile(llama.forward, backend="eager")
    elif how == "its blocks":
        for layer in llama.model.layers:
            layer.mlp.compile(backend="eager")
    else:
        model = torch.nn.DataParallel(llama)
    with torch.no_grad():
        before = model(**batch).logits  # compiled without hooks
        assert measure(model, [batch]) == expected
        assert torch.equal(model(**batch).logits, before)


def test_inside_of_inference_mode_nothing_is_made_that_cannot_be_trained(input_ids):
    # The frequencies of this rotary embedding are made anew where a sequence is longer than those before.
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = untrained_llama(rope_parameters=scaling, max_position_embeddings=16)
    with torch.inference_mode():
        measure(model, [{"input_ids": input_ids}])
    assert not model.model.rotary_emb.inv_freq.is_inference()
    model(input_ids=input_ids, labels=input_ids).loss.backward()


def test_autocast_and_frozen_weights(llama, input_ids):
    hf_sparse.patch(llama, "relu")
    plain = measure(llama, [{"input_ids": input_ids}])
    llama.model.requires_grad_(False)
    assert measure(llama, [{"input_ids": input_ids}]) == plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(llama, [{"input_ids": input_ids}]).sparsity == pytest.approx(plain.sparsity, abs=0.01)


@pytest.mark.parametrize("nulls", [(), (0, 1), (2, 5), (11,)])
@pytest.mark.parametrize("rows", [False, True])
def test_null_texts_are_left_out(llama, tokenizer, nulls, rows):
    def shaped(texts):
        return [{"text": t, "url": None} for t in texts] if rows else texts

    missing = [None if i in nulls else text for i, text in enumerate(TEXTS)]
    kept = [text for text in missing if text is not None]
    options = {"tokenizer": tokenizer, "sequence_length": 16}
    assert measure(llama, shaped(missing), **options) == measure(llama, shaped(kept), **options)


def test_what_is_no_text_is_named_wherever_it_comes(llama, tokenizer):
    with pytest.raises(ValueError, match="data holds <class 'int'> at index 2"):
        measure(llama, ["text", None, 3], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a mapping with texts at index 1"):
        measure(llama, [{"text": "text"}, {"texts": "text"}], tokenizer=tokenizer)


def test_reports_on_parts_add_up(llama):
    hf_sparse.patch(llama, "relu")
    batches = [{"input_ids": torch.randint(5, 1500, (n, 7))} for n in (1, 3, 2)]
    whole, summed = measure(llama, batches), sum(measure(llama, [batch]) for batch in batches)
    assert summed.layers == whole.layers
    assert (summed.tokens, summed.predicted_tokens) == (whole.tokens, whole.predicted_tokens) == (42, 36)
    assert summed.loss == pytest.approx(whole.loss, rel=1e-12)


def test_reports_of_different_things_do_not_add_up(llama, tokenizer):
    short, long = (measure(llama, TEXTS, tokenizer=tokenizer, sequence_length=n) for n in (8, 16))
    with pytest.raises(ValueError, match="sequence_length=8 and 16"):
        short + long
    with pytest.raises(ValueError, match="3 MLP blocks and one of 2"):
        short + replace(short, layers=short.layers[:2])
    with pytest.raises(ValueError, match="are not one block"):
        short + replace(short, layers=short.layers[::-1])


def test_models_that_do_not_predict_the_next_token_are_refused(llama, input_ids):
    batch = [{"input_ids": input_ids}]
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        measure(t5, batch)
    with pytest.raises(ValueError, match="no logits; load it with AutoModelForCausalLM"):
        measure(llama.model, batch)
    with pytest.raises(ValueError, match=r"logits \[2, 2\] for input_ids \[2, 17\]"):
        measure(LlamaForSequenceClassification(llama.config), batch)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no token to predict"),
        ("one text", {}, "one str"),
        ([3], {}, "data holds <class 'int'> at index 0"),
        ([None, {"text": None}], {}, "2 texts, and all of them are null"),
        ([None, {"input_ids": [1, 2]}], {}, "mixes batches with NoneType"),
        ([{"words": "x"}], {}, "a mapping with words"),
        (["text"], {}, "Pass tokenizer="),
        (["text"], {"sequence_length": 65}, "sequence_length=65 .* 64"),
        (["text"], {"sequence_length": 1}, "sequence_length=1 "),
        (["text"], {"batch_size": 0}, "batch_size=0"),
        ([{"input_ids": torch.ones(1, 4).long(), "seq_idx": torch.zeros(1, 4)}], {}, "holds seq_idx"),
        (
            [{"input_ids": torch.ones(1, 4).long(), "position_ids": torch.ones(3, 1, 4).long()}],
            {},
            "position_ids has",
        ),
        (
            [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}],
            {},
            "attention_mask has",
        ),
    ],
)
def test_errors_name_the_mend(llama, data, options, message):
    with pytest.raises(ValueError, match=message):
        measure(llama, data, **options)


def test_no_blocks_is_an_error():
    with pytest.raises(hf_sparse.PatchError, match="no MLP block of a known shape in Linear"):
        measure(torch.nn.Linear(3, 3), ["text"])


def test_a_report_comes_back_from_its_file_and_nothing_else_does(tiny_model, tmp_path) -> None:
    report = hf_sparse.measure(tiny_model("opt"), [{"input_ids": torch.arange(3, 20)[None]}])
    path = tmp_path / "r.json"
    report.to_json(path)
    assert hf_sparse.SparsityReport.from_json(path) == report
    data = report.to_dict()
    layers = [{**data["layers"][0], "zeros": 10**9}]
    for wrong in ([], {}, {**data, "tokens": -1}, {**data, "layers": layers}, {**data, "layers": []}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"r\.json is no report of a measurement"):
            hf_sparse.SparsityReport.from_json(path)


def test_dead_neurons_are_those_that_no_token_activates(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    parts = [{"input_ids": torch.tensor([[5, 9]])}, {"input_ids": torch.tensor([[7, 3, 8]])}]
    seen: dict[str, list[torch.Tensor]] = {}
    downs = {name: m for name, m in model.named_modules() if name.endswith("down_proj")}
    for name, module in downs.items():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    whole = hf_sparse.measure(model, parts)
    expected = [int((torch.cat([h[0] for h in seen[name]]) == 0).all(0).sum()) for name in downs]
    assert [layer.dead for layer in whole.layers] == expected
    assert sum(expected) == whole.dead > 0
    # Of parts each knows which neurons are dead, and not only how many.
    assert sum(hf_sparse.measure(model, [part]) for part in parts).dead == whole.dead
    assert hf_sparse.measure(model, parts[:1]).dead > whole.dead


def test_dead_neurons_go_through_a_file_as_a_number(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    report = hf_sparse.measure(model, [{"input_ids": torch.arange(3, 20)[None]}])
    report.to_json(tmp_path / "r.json")
    read = hf_sparse.SparsityReport.from_json(tmp_path / "r.json")
    assert read.dead == report.dead
    assert (read + report).dead is None
