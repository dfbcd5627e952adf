"""One pass of data through a model, with observers at the sites of its MLP blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hf_sparse.adapters import Block, require_blocks
from hf_sparse.checks import require_positive
from hf_sparse.observing.batches import as_batches, parts
from hf_sparse.observing.encoder_decoder import IGNORED, in_encoder, seen
from hf_sparse.observing.encoder_decoder import losses as labels_losses
from hf_sparse.observing.observer import BlockObserver
from hf_sparse.observing.running import inner_model, input_device, observed, takes_gradients, without_copies


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What went through the model."""

    loss: float
    """Mean cross-entropy of the next token, in nats, over all predicted tokens."""
    tokens: int
    """Without padding; of an encoder-decoder, through both of its stacks."""
    predicted_tokens: int
    """Those the loss is over."""
    sequence_length: int | None
    """Tokens in a window of text; None if the data came in batches."""


def blocks_of(model: nn.Module) -> list[Block]:
    """The MLP blocks that :func:`observe` runs of ``model``: observers are made of these.

    Raises:
        PatchError: there is none.

    """
    return list(require_blocks(without_copies(model))[0])


def observe(
    model: nn.Module,
    data: Iterable[Any],
    observers: Sequence[BlockObserver],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
    grad: bool = False,
) -> Pass:
    """Run ``model`` over ``data`` with ``observers``, and leave it as it was.

    Args:
        model: as :func:`hf_sparse.measure` takes it, with the data and options that are described there.
        data: texts, rows with a ``"text"``, or batches.
        observers: of :func:`blocks_of` ``(model)``; entered for the time of the pass.
        tokenizer: for texts.
        sequence_length: tokens per window of text.
        batch_size: windows per forward.
        max_tokens: stop after this many tokens.
        progress: show a progress bar.
        grad: after each forward go back through it, from the summed loss of its tokens, and give observers
            the gradients. No parameter gets one.

    Raises:
        ValueError: no data, or data of another kind; see :func:`hf_sparse.measure`.

    """
    require_positive(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    model = without_copies(model)
    bare = inner_model(model)
    batches, window = as_batches(
        bare,
        data,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    two_stacks = getattr(bare.config, "is_encoder_decoder", False)
    of_encoder = in_encoder(bare, [one.block for one in observers]) if two_stacks else None
    loss = 0.0
    tokens = predicted = 0
    device = input_device(bare)
    with ExitStack() as stack:
        stack.enter_context(observed(model, grad=grad))
        if grad:
            stack.enter_context(takes_gradients(model, bare))
        for one in observers:
            stack.enter_context(one)
        bar = stack.enter_context(_bar(max_tokens, progress))
        for batch in batches:
            if of_encoder is not None:
                given = seen(bare, batch, device)
                size = given.show(observers, of_encoder)
                labels = given.inputs["labels"]
                rows = labels_losses(model(**given.inputs, use_cache=False), labels)
                count = int((labels != IGNORED).sum())
            else:
                rows, count, size = _of_decoder(model, bare, batch, device, observers)
            loss += _summed(rows, grad)
            predicted += count
            tokens += size
            bar.update(size)
            if max_tokens is not None and tokens >= max_tokens:
                break
    if not predicted:
        raise ValueError(
            "data holds no token to predict: it is empty, an iterator that was used up before, or all its "
            "texts are shorter than two tokens."
        )
    return Pass(loss=loss / predicted, tokens=tokens, predicted_tokens=predicted, sequence_length=window)


def _of_decoder(
    model: nn.Module,
    bare: PreTrainedModel,
    batch: Mapping[str, Any],
    device: torch.device,
    observers: Sequence[BlockObserver],
) -> tuple[Iterator[Tensor], int, int]:
    """A forward of a causal language model: the losses of its sequences, tokens predicted, tokens seen."""
    input_ids, mask, labels, positions = parts(batch, device)
    padding = mask is not None and not mask.all()
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.count_nonzero(1).tolist()
    for one in observers:
        one.mask = mask if padding else None
        one.lengths = lengths
    extra: dict[str, Tensor] = {}
    takes_positions = "position_ids" in signature(bare.forward).parameters
    if positions is not None:
        if not takes_positions:
            raise ValueError(
                f"a batch holds position_ids, and {type(bare).__name__} takes none; leave them out, and give "
                "documents one by one."
            )
        extra["position_ids"] = positions
    elif mask is not None and not mask[:, 0].all() and takes_positions:
        extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)  # padded on the left
    output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra)
    rows, targets = _losses(output, input_ids, mask, labels, positions)
    return rows, int((targets != IGNORED).sum()), sum(lengths)


def _losses(
    output: Any, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None, positions: Tensor | None
) -> tuple[Iterator[Tensor], Tensor]:
    """Summed cross-entropy of the next tokens of each sequence, in nats, and these tokens."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError("the model gives no logits; load it with AutoModelForCausalLM.")
    if logits.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"the model gives logits {list(logits.shape)} for input_ids {list(input_ids.shape)}, where "
            "measure needs a row for each token: load it with AutoModelForCausalLM, and without prompt "
            "tuning, which adds tokens of its own."
        )
    targets = (input_ids if labels is None else labels).clone()
    if mask is not None:
        targets[mask == 0] = IGNORED
        targets[:, 1:][mask[:, :-1] == 0] = IGNORED  # what follows padding is not predicted from text
    if positions is not None:
        targets[:, 1:][positions[:, 1:] == 0] = IGNORED  # nor is what begins another document
    targets = targets[:, 1:].to(logits.device)
    pairs = zip(logits[:, :-1], targets, strict=True)  # one sequence at a time in float32
    rows = (cross_entropy(x.float(), y, reduction="sum", ignore_index=IGNORED) for x, y in pairs)
    return rows, targets


def _summed(rows: Iterable[Tensor], grad: bool) -> float:
    """The sum, gone back through if that is wanted."""
    if not grad:
        return sum(row.item() for row in rows)
    total = torch.stack(list(rows)).sum()
    total.backward()
    return total.item()


def _bar(max_tokens: int | None, progress: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=max_tokens, desc="measure", unit=" tokens", unit_scale=True, disable=not progress)
