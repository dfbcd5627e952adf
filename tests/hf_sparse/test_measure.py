"""hf_sparse.measure: counts against a computation by hand, what it leaves behind, report, errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

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


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no token to predict"),
        ("one text", {}, "one str"),
        ([3], {}, "data holds <class 'int'>"),
        ([{"words": "x"}], {}, "a mapping with words"),
        (["text"], {}, "Pass tokenizer="),
        (["text"], {"sequence_length": 65}, "sequence_length=65 .* 64"),
        (["text"], {"sequence_length": 1}, "sequence_length=1 "),
        (["text"], {"batch_size": 0}, "batch_size=0"),
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


def test_import_stays_light():
    code = """
import sys
from transformers import PreTrainedModel  # brings accelerate by itself where it is installed
before = set(sys.modules)
import hf_sparse, hf_sparse.cli
heavy = {"matplotlib", "datasets", "accelerate", "peft", "pandas", "tensorboard"}
print(sorted(heavy.intersection(set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
