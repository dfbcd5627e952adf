"""Zeroth biases of T5, whose blocks and models know no positions: the papers' model, encoder and decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

import hf_sparse
from support.models import tiny_t5
from support.twins import assert_close
from support.zeroth import biased, gradients, left_padded, logits


@pytest.fixture
def texts() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, 128, (2, 9)), "decoder_input_ids": torch.randint(2, 128, (2, 7))}


@pytest.mark.parametrize("placement", ["input", "output"])
def test_it_is_what_hooks_on_the_stock_blocks_add(placement, texts) -> None:
    model = biased("t5", placement=placement, positions=16)
    by_hand = copy.deepcopy(model)
    hf_sparse.unpatch(by_hand)
    for stack, names in ((by_hand.encoder, "encoder"), (by_hand.decoder, "decoder")):
        for i, layer in enumerate(stack.block):
            table = model.get_parameter(
                f"{names}.block.{i}.layer.{len(layer.layer) - 1}.DenseReluDense.zeroth_bias.bias"
            )
            block = layer.layer[-1].DenseReluDense
            rows = table[: 9 if names == "encoder" else 7]
            if placement == "input":
                block.register_forward_pre_hook(lambda _, args, rows=rows: (args[0] + rows,))
            else:
                block.register_forward_hook(lambda _, __, output, rows=rows: output + rows)
    assert torch.equal(logits(model, **texts), logits(by_hand, **texts))


def test_the_number_of_positions_has_to_be_given(texts) -> None:
    model = tiny_t5()
    expected = logits(model, **texts)
    with pytest.raises(hf_sparse.PatchError, match=r"how many positions it has: .*positions=512"):
        hf_sparse.patch(model, {"activation": "jsrelu", "zeroth_bias": {}})
    hf_sparse.patch(model, {"activation": "relu", "zeroth_bias": {"positions": 512}})
    assert torch.equal(logits(model, **texts), expected)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_decoding_with_a_cache_is_the_forward_without(how, texts) -> None:
    model = biased("t5")
    ids, mask = left_padded(texts["input_ids"], 2)
    done = model.generate(
        ids,
        attention_mask=mask,
        decoder_input_ids=texts["decoder_input_ids"][:, :3],
        max_new_tokens=9,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    whole = logits(model, input_ids=texts["input_ids"], decoder_input_ids=done.sequences)
    assert_close(torch.stack(done.logits, dim=1), whole[:, -10:-1])


def test_padding_moves_nothing(texts) -> None:
    model = biased("t5")
    expected = logits(model, **texts)
    ids, mask = left_padded(texts["input_ids"], 3)
    dec, dec_mask = left_padded(texts["decoder_input_ids"], 2)
    found = logits(
        model, input_ids=ids, attention_mask=mask, decoder_input_ids=dec, decoder_attention_mask=dec_mask
    )
    assert_close(found[:, 2:], expected)
    right = {"input_ids": ids.roll(-3, 1), "attention_mask": mask.roll(-3, 1)}
    assert_close(logits(model, **{**texts, **right}), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_gets_the_positions_of_its_forward(reentrant, texts) -> None:
    model = biased("t5", "jsrelu")
    batches = []
    for by in (0, 3):
        ids, mask = left_padded(texts["input_ids"], by)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": texts["decoder_input_ids"]})
    expected = gradients(model, batches)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    for found, want in zip(gradients(model, batches), expected, strict=True):
        assert_close(found, want)


def test_round_trip(texts, tmp_path) -> None:
    model = biased("t5")
    model.save_pretrained(tmp_path)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, **texts), logits(model, **texts))
    assert hf_sparse.inspect(loaded).config == hf_sparse.inspect(model).config
