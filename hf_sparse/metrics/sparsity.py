"""measure: activation sparsity and perplexity of a model on text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_sparse.adapters import Block, find_blocks
from hf_sparse.errors import PatchError
from hf_sparse.metrics.report import LayerSparsity, SparsityReport
from hf_sparse.windows import windows

_LONGEST_DEFAULT = 1024


def measure(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = False,
) -> SparsityReport:
    """Run ``model`` over ``data``; report per-layer and overall activation sparsity, loss and perplexity.

    Sparsity is the share of exact zeros among the values that reach the down projections of the MLP blocks,
    over tokens, neurons and layers. A dense (SiLU, GELU) model has none. Works on stock, patched and
    PEFT-wrapped models, and leaves the model as it was: mode, hooks, weights.

    Args:
        model: a causal language model of transformers.
        data: texts; or rows with a ``"text"``, as ``datasets`` gives them; or batches, as of a DataLoader:
            mappings with ``input_ids`` int64 ``[B, S]`` and optionally ``attention_mask`` ``[B, S]`` (where
            it is 0 there is padding, which counts nowhere) and ``labels`` ``[B, S]`` (-100 is left out of
            the loss).
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text. Texts are joined by end-of-text tokens and cut. None means
            the model's context, at most 1,024.
        batch_size: windows per forward.
        max_tokens: stop after this many tokens (batches are not cut: after the batch that reaches it).
        progress: show a progress bar.

    Raises:
        PatchError: no MLP block of a known shape in ``model``.
        ValueError: no data, or data of another kind; no tokenizer; a size out of range.

    """
    _require_positive(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    blocks, _ = find_blocks(model)
    if not blocks:
        raise PatchError(
            f"no MLP block of a known shape in {type(model).__name__}, so there is no sparsity to measure; "
            "hf_sparse.inspect(model) says what was looked at."
        )
    batches, window = _batches(model, data, tokenizer, sequence_length, batch_size, max_tokens)
    counters = [_ZeroCounter(block) for block in blocks]
    loss = torch.zeros((), dtype=torch.float64)
    tokens = predicted = 0
    bare: Any = model
    if hasattr(bare, "get_base_model"):
        bare = bare.get_base_model()
    takes_positions = "position_ids" in signature(bare.forward).parameters
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # tensors of inference mode would break training that follows
        stack.enter_context(_evaluating(model))
        for counter in counters:
            stack.enter_context(counter)
        bar = stack.enter_context(_bar(max_tokens, progress))
        device = next(model.parameters()).device
        for batch in batches:
            input_ids, mask, labels = (None if t is None else t.to(device) for t in _parts(batch))
            assert input_ids is not None
            padding = mask is not None and not mask.all()
            for counter in counters:
                counter.mask = mask if padding else None
            extra: dict[str, Tensor] = {}
            if mask is not None and not mask[:, 0].all() and takes_positions:
                extra["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)  # padded on the left
            output = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra)
            total, count = _loss(output, input_ids, mask, labels)
            loss += total
            predicted += count
            size = input_ids.numel() if mask is None else int(mask.count_nonzero())
            tokens += size
            bar.update(size)
            if max_tokens is not None and tokens >= max_tokens:
                break
    if not predicted:
        raise ValueError(
            "data holds no token to predict: it is empty, an iterator that was used up before, or all its "
            "texts are shorter than two tokens."
        )
    return SparsityReport(
        layers=tuple(counter.result() for counter in counters),
        loss=loss.item() / predicted,
        tokens=tokens,
        predicted_tokens=predicted,
        sequence_length=window,
    )


class _ZeroCounter:
    """Counts, while entered, the exact zeros in what reaches one block's down projection."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._zeros: Tensor | None = None
        self._tokens = 0
        self._neurons = block.intermediate_size
        self.mask: Tensor | None = None
        """Int ``[B, S]``, 0 at padding; None means there is none."""

    def __enter__(self) -> _ZeroCounter:
        # A hooked linear layer is called as a module, so a patched block takes its dense path: the zeros are
        # the same ones, and they can be seen.
        self._handle = self._block.down_linear.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h_TF = (args[0] if args else next(iter(kwargs.values()))).flatten(0, -2)
        if self.mask is not None:
            if len(h_TF) != self.mask.numel():
                raise ValueError(
                    f"{self._block.name} received {len(h_TF)} tokens of a batch of {self.mask.numel()}, so "
                    "padding cannot be told from text there; give batches without padding."
                )
            h_TF = h_TF[self.mask.flatten().to(h_TF.device).bool()]
        # count_nonzero takes NaN for a value, as it should be: NaN is not silence.
        zeros = h_TF.numel() - torch.count_nonzero(h_TF)
        self._zeros = zeros if self._zeros is None else self._zeros + zeros
        self._tokens += len(h_TF)

    def result(self) -> LayerSparsity:
        zeros = 0 if self._zeros is None else int(self._zeros)
        return LayerSparsity(name=self._block.name, neurons=self._neurons, tokens=self._tokens, zeros=zeros)


def _batches(
    model: nn.Module,
    data: Iterable[Any],
    tokenizer: Any,
    sequence_length: int | None,
    batch_size: int,
    max_tokens: int | None,
) -> tuple[Iterator[Mapping[str, Any]], int | None]:
    """``data`` as batches, and the window length if it is text."""
    if isinstance(data, str | Mapping):
        raise ValueError(f"data is one {type(data).__name__}; give a list of texts, or of batches: [data].")
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        return iter(()), None
    whole = chain([first], iterator)
    if isinstance(first, Mapping) and "input_ids" in first:
        return whole, None
    if not (isinstance(first, str) or (isinstance(first, Mapping) and isinstance(first.get("text"), str))):
        found = (
            f"a mapping with {', '.join(map(str, first))}"
            if isinstance(first, Mapping)
            else repr(type(first))
        )
        raise ValueError(f"data holds {found}; give texts, rows with a 'text', or batches with input_ids.")
    texts = (item if isinstance(item, str) else item["text"] for item in whole)
    length = _window(model, sequence_length)
    packed = windows(
        texts,
        tokenizer if tokenizer is not None else _own_tokenizer(model),
        sequence_length=length,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    return ({"input_ids": ids} for ids in packed), length


def _window(model: nn.Module, asked: int | None) -> int:
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(context or _LONGEST_DEFAULT, _LONGEST_DEFAULT)
    if asked < 2:
        raise ValueError(f"sequence_length={asked} leaves nothing to predict; use 2 or more.")
    if context is not None and asked > context:
        raise ValueError(f"sequence_length={asked} is longer than the model's context of {context} tokens.")
    return asked


def _own_tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    reason = "the model has no name_or_path"
    if name:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = f"{name!r} has none that loads: {str(error).splitlines()[0]}"
    raise ValueError(f"texts need a tokenizer, and {reason}. Pass tokenizer=…, or batches of input_ids.")


def _parts(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``input_ids``, ``attention_mask`` and ``labels`` of a batch as ``[B, S]`` tensors."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"data mixes batches with {type(batch).__name__}; every batch needs input_ids.")
    input_ids = _rows(batch["input_ids"])
    others: list[Tensor | None] = []
    for key in ("attention_mask", "labels"):
        tensor = None if batch.get(key) is None else _rows(batch[key])
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{key} has shape {list(tensor.shape)} beside input_ids of {list(input_ids.shape)}; "
                "both must be [B, S]."
            )
        others.append(tensor)
    return input_ids, others[0], others[1]


def _rows(value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError):
        raise ValueError(
            "a batch holds lists that are no [B, S] tensor; with datasets, use set_format('torch')."
        ) from None
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor


def _loss(output: Any, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> tuple[float, int]:
    """Summed cross-entropy of the next tokens, in nats, and their number."""
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError("the model gives no logits; load it with AutoModelForCausalLM.")
    targets = (input_ids if labels is None else labels).clone()
    if mask is not None:
        targets[mask == 0] = -100
        targets[:, 1:][mask[:, :-1] == 0] = -100  # what follows padding is not predicted from text
    targets = targets[:, 1:].to(logits.device)
    total = 0.0
    for row, target in zip(logits[:, :-1], targets, strict=True):  # one sequence at a time in float32
        total += cross_entropy(row.float(), target, reduction="sum", ignore_index=-100).item()
    return total, int((targets != -100).sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, every module is again in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _bar(max_tokens: int | None, progress: bool) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=max_tokens, desc="measure", unit=" tokens", unit_scale=True, disable=not progress)


def _require_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is out of range; use 1 or more.")
