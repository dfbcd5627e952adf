"""How an encoder-decoder is measured: two rows of tokens, and blocks that see the one or the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.errors import PatchError
from hf_sparse.observing.batches import rows
from hf_sparse.observing.observer import BlockObserver

IGNORED = -100
"""A label that is left out of the loss."""


class Seen(NamedTuple):
    """A batch as an encoder-decoder takes it."""

    inputs: dict[str, Tensor]
    """Arguments of the forward."""
    encoder_mask: Tensor
    """``[B, S]``, 0 at padding."""
    decoder_mask: Tensor
    """``[B, T]``, 0 at padding."""

    def show(self, observers: Sequence[BlockObserver], of_encoder: Sequence[bool]) -> int:
        """Tell ``observers`` what is padding, by whether each is of the encoder; gives the tokens of both."""
        lengths = [mask.count_nonzero(1).tolist() for mask in self[1:]]
        for one, inside in zip(observers, of_encoder, strict=True):
            one.mask = self.encoder_mask if inside else self.decoder_mask
            one.lengths = lengths[0] if inside else lengths[1]
        return sum(map(sum, lengths))


def in_encoder(model: PreTrainedModel, blocks: Sequence[Block]) -> list[bool]:
    """Of each block, whether it is given the tokens of the encoder; else it is given those of the decoder.

    Raises:
        PatchError: a block is in both, or in neither.

    """
    encoder, decoder = ({id(m) for m in one.modules()} for one in (model.get_encoder(), model.get_decoder()))
    for block in blocks:
        if (id(block.module) in encoder) == (id(block.module) in decoder):
            raise PatchError(
                f"{block.name} of {type(model).__name__} is not in either its encoder or its decoder, so "
                "that the tokens that reach it cannot be counted."
            )
    return [id(block.module) in encoder for block in blocks]


def seen(model: PreTrainedModel, batch: Any, device: torch.device) -> Seen:
    """A batch for ``model`` on ``device``.

    ``input_ids`` and optionally ``attention_mask`` are ``[B, S]``; ``labels``, and optionally
    ``decoder_input_ids`` and ``decoder_attention_mask``, ``[B, T]``. Without the last, labels of -100 are
    padding.

    Raises:
        ValueError: it is no such batch, or ``model`` takes no labels.

    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"data mixes batches with {type(batch).__name__}; every batch needs input_ids.")
    if batch.get("labels") is None:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: a batch needs labels [B, T], what its decoder is "
            "to give, beside input_ids."
        )
    if "labels" not in signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} gives no logits; load it with AutoModelForSeq2SeqLM.")
    given = {key: rows(batch[key]).to(device) for key in _KEYS if batch.get(key) is not None}
    for key, tensor in given.items():
        like = given["labels" if key.startswith("decoder_") else "input_ids"]
        if tensor.shape != like.shape and (key != "labels" or len(tensor) != len(like)):
            raise ValueError(
                f"{key} has shape {list(tensor.shape)} beside input_ids of {list(given['input_ids'].shape)} "
                f"and labels of {list(given['labels'].shape)}; they must be [B, S] and [B, T]."
            )
    encoder_mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    decoder_mask = given.get("decoder_attention_mask", given["labels"] != IGNORED)
    return Seen(given, encoder_mask, decoder_mask)


def losses(output: Any, labels: Tensor) -> Iterator[Tensor]:
    """Summed cross-entropy of the labels of each row, in nats; the model shifts its input itself.

    Raises:
        ValueError: the model gives no row of logits for each label.

    """
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "the model does not give a row of logits for each label; load it with AutoModelForSeq2SeqLM."
        )
    pairs = zip(logits, labels.to(logits.device), strict=True)  # one at a time in float32
    return (cross_entropy(x.float(), y, reduction="sum", ignore_index=IGNORED) for x, y in pairs)


_KEYS = ("input_ids", "labels", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
