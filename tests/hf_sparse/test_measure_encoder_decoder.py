"""measure on encoder-decoders: blocks count the tokens of their own stack, the loss is over the labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForConditionalGeneration, T5Model

import hf_sparse
from hf_sparse.metrics import measure
from support.models import tiny_t5


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Padded on the right, differently in the inputs and in the labels."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = 0
    labels = torch.randint(2, 128, (3, 7))
    labels[0, 4:] = labels[2, 6:] = -100
    return {"input_ids": torch.randint(2, 128, (3, 9)), "attention_mask": mask, "labels": labels}


def by_hand(model, batch: dict[str, Tensor]) -> tuple[dict[str, tuple[int, int]], float]:
    """Zeros and values by block, and the loss, one sequence at a time and without padding."""
    counts = {n: [0, 0] for n, m in model.named_modules() if n.endswith("DenseReluDense")}

    def count(name: str, h: Tensor) -> None:
        counts[name][0] += int((h == 0).sum())
        counts[name][1] += h.numel()

    handles = [
        model.get_submodule(name).wo.register_forward_pre_hook(
            lambda _, args, name=name: count(name, args[0])
        )
        for name in counts
    ]
    total, predicted = 0.0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()], labels[labels != -100]
        start = torch.tensor([model.config.decoder_start_token_id])
        with torch.no_grad():
            shifted = torch.cat([start, labels[:-1]])
            logits = model(input_ids=ids[None], decoder_input_ids=shifted[None]).logits[0]
        total += cross_entropy(logits, labels, reduction="sum").item()
        predicted += len(labels)
    for handle in handles:
        handle.remove()
    return {name: (zeros, values) for name, (zeros, values) in counts.items()}, total / predicted


@pytest.mark.parametrize("patched", [False, True])
def test_it_is_what_counting_by_hand_gives(batch, patched):
    model = tiny_t5()
    if patched:
        hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="jsrelu", zeroth_bias={"positions": 16}))
    expected, loss = by_hand(model, batch)
    report = measure(model, [batch])
    assert {layer.name: (layer.zeros, layer.tokens * layer.neurons) for layer in report.layers} == expected
    assert [layer.tokens for layer in report.layers] == [9 + 5 + 7] * 2 + [4 + 7 + 6] * 2
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert (report.tokens, report.predicted_tokens) == (21 + 17, 17)
    assert 0.2 < report.sparsity < 0.8


def test_without_padding_its_loss_is_the_models_own(batch):
    model = tiny_t5()
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"].clamp(min=2)}
    report = measure(model, [batch, batch])
    assert report.loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert [layer.tokens for layer in report.layers] == [54, 54, 42, 42]


def test_a_mask_for_the_decoder_says_what_it_sees(batch):
    """Labels may then leave out tokens of the loss alone."""
    batch["decoder_attention_mask"] = torch.ones(3, 7, dtype=torch.int64)
    report = measure(tiny_t5(), [batch])
    assert [layer.tokens for layer in report.layers] == [21, 21, 21, 21]
    assert report.predicted_tokens == 17


def test_the_family_of_bart_too(batch):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": 128}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    config = BartConfig(**sizes, encoder_ffn_dim=40, decoder_ffn_dim=48, activation_function="relu")
    report = measure(BartForConditionalGeneration(config), [batch])
    assert [(layer.neurons, layer.tokens) for layer in report.layers] == [(40, 21), (48, 17), (48, 17)]


def test_what_does_not_say_what_to_predict_is_refused(batch):
    model = tiny_t5()
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match=r"is an encoder-decoder, and texts .* give batches"):
        measure(model, ["a text"])
    with pytest.raises(ValueError, match="is an encoder-decoder: a batch needs labels"):
        measure(model, [{"input_ids": ids}])
    with pytest.raises(ValueError, match=r"labels has shape \[2, 7\] beside input_ids of \[3, 9\]"):
        measure(model, [{"input_ids": ids, "labels": batch["labels"][:2]}])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 7\]"):
        measure(model, [{**batch, "attention_mask": batch["labels"]}])
    with pytest.raises(ValueError, match="no logits; load it with AutoModelForSeq2SeqLM"):
        measure(T5Model(model.config), [batch])
