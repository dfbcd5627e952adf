"""What a measurement runs on: texts, rows of a data set or batches, all made batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse.windows import context_length, require_window, windows

_LONGEST_DEFAULT = 1024


def as_batches(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any,
    sequence_length: int | None,
    batch_size: int,
    max_tokens: int | None,
) -> tuple[Iterator[Mapping[str, Any]], int | None]:
    """``data`` as batches with ``input_ids``, and the window length if it is text.

    Args:
        model: whose context bounds the windows, and whose tokenizer is loaded if none is given.
        data: see :func:`hf_sparse.measure`; texts that are null are left out.
        tokenizer: for texts.
        sequence_length: tokens per window of text.
        batch_size: windows per batch.
        max_tokens: tokens of text in all.

    Raises:
        ValueError: see :func:`hf_sparse.measure`.

    """
    if isinstance(data, str | Mapping):
        raise ValueError(f"data is one {type(data).__name__}; give a list of texts, or of batches: [data].")
    iterator = iter(data)
    begun: list[Any] = []
    for item in iterator:
        begun.append(item)
        if not _is_null(item):
            break
    else:
        if begun:
            raise ValueError(f"data holds {len(begun)} texts, and all of them are null (None).")
        return iter(()), None
    whole = chain(begun, iterator)
    if isinstance(begun[-1], Mapping) and "input_ids" in begun[-1]:
        return whole, None
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, and texts do not say what its decoder is to give "
            "for which input; give batches with input_ids [B, S] and labels [B, T]."
        )
    texts = _texts(whole)
    texts = chain([next(texts)], texts)  # a mistake in the kind of data comes before one in its options
    length = _window(model, sequence_length)
    packed = windows(
        texts,
        tokenizer if tokenizer is not None else _own_tokenizer(model),
        sequence_length=length,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    return ({"input_ids": ids} for ids in packed), length


class Parts(NamedTuple):
    """A batch as a causal language model takes it: tensors ``[B, S]``."""

    input_ids: Tensor
    mask: Tensor | None
    labels: Tensor | None
    positions: Tensor | None


def parts(batch: Any, device: torch.device) -> Parts:
    """What a batch holds, on ``device``.

    Raises:
        ValueError: it is no such batch.

    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"data mixes batches with {type(batch).__name__}; every batch needs input_ids.")
    if packed := [key for key in _OF_PACKED if batch.get(key) is not None]:
        raise ValueError(
            f"a batch holds {packed[0]}, which says where documents begin in a form that is not passed on; "
            "give position_ids [B, S] that begin anew instead, or documents one by one."
        )
    input_ids = rows(batch["input_ids"])
    others: list[Tensor | None] = []
    for key in ("attention_mask", "labels", "position_ids"):
        tensor = None if batch.get(key) is None else rows(batch[key])
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)} beside input_ids of {list(input_ids.shape)}; "
                "both must be [B, S]."
            )
        others.append(None if tensor is None else tensor.to(device))
    return Parts(input_ids.to(device), *others)


_OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def _is_null(item: Any) -> bool:
    """Whether ``item`` is a text, or a row, that a data set has no value for."""
    row = isinstance(item, Mapping) and "input_ids" not in item and "text" in item
    return item is None or (row and item["text"] is None)


def _texts(items: Iterable[Any]) -> Iterator[str]:
    for index, item in enumerate(items):
        if _is_null(item):
            continue
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            found = f"a mapping with {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item)
            raise ValueError(
                f"data holds {found} at index {index}; give texts, rows with a 'text', or batches with "
                "input_ids."
            )
        yield text


def _window(model: nn.Module, asked: int | None) -> int:
    context = context_length(model)
    if asked is None:
        return min(context or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    require_window(asked)
    if context is not None and asked > context:
        raise ValueError(f"sequence_length={asked} is longer than the model's context of {context} tokens.")
    return asked


def _own_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    reason = "the model has no name_or_path"
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = f"{name!r} has none that loads: {str(error).splitlines()[0]}"
    raise ValueError(f"texts need a tokenizer, and {reason}. Pass tokenizer=…, or batches of input_ids.")


def rows(value: Any) -> Tensor:
    """A tensor ``[B, S]`` of what a batch holds.

    Raises:
        ValueError: it is none.

    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError):
        raise ValueError(
            "a batch holds lists that are no [B, S] tensor; with datasets, use set_format('torch')."
        ) from None
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
