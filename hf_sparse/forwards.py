"""What passes the MLP blocks of a model while it is trained: in each forward once, and what of it is text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.adapters import Block, require_blocks
from hf_sparse.adapters.roles import Site

Seen = Callable[[int, Tensor, "Tensor | None"], None]
"""Gets the number of a block, what passes its site, ``[..., F]`` or ``[..., D]``, and which of the rows are
text, bool ``[T]``; None: all are."""


class Forwards:
    """Calls ``seen`` with what passes a site of every MLP block in each forward of ``model``.

    Padding is where a two-dimensional ``attention_mask`` of the forward is 0 (in the blocks of a decoder that
    has an encoder, ``decoder_attention_mask``); masks of other shapes say which tokens see which, and not
    what is padding. That a label is -100 does not matter: a prompt that is not to be learned is computed
    nevertheless.

    Args:
        model: the bare model, before or after it is wrapped for data parallelism.
        site: see :meth:`hf_sparse.adapters.Block.watch`.
        seen: what to call.
        begin: called before each forward.
        only: which blocks; others are not watched.

    Raises:
        PatchError: no MLP block of a known shape is found in ``model``.
        ValueError: the site of a block cannot be watched. No hook is left.

    """

    blocks: list[Block]
    running: bool
    """Whether a forward runs. If not, ``seen`` is called by gradient checkpointing, which recomputes a layer
    during backward, and gets what it has got before."""
    length: int | None
    """Tokens in a sequence of the forward; None where that is not known, and of an encoder-decoder."""
    rows: Tensor | None
    """Of which token each row is that is seen, int64, over all sequences; None: they are in order."""

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        seen: Seen,
        *,
        begin: Callable[[], None] = lambda: None,
        only: Callable[[Block], bool] = lambda block: True,
    ) -> None:
        self.blocks = [block for block in require_blocks(model)[0] if only(block)]
        self.running = False
        self.length = self.rows = None
        self._seen, self._begin_of = seen, begin
        self._in_decoder = [in_decoder(model, block.name) for block in self.blocks]
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        try:
            for i, block in enumerate(self.blocks):
                self._handles.append(block.watch(site, partial(self._pass, i)))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = _given(module, args, kwargs)
        self._masks = _masks(given)
        self.length = _length(given)
        self.running = True
        self._begin_of()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False

    def _pass(self, index: int, values: Tensor, tokens: Tensor | None) -> None:
        self.rows = tokens
        self._seen(index, values, self._text(index, values, tokens))

    def _text(self, index: int, values: Tensor, tokens: Tensor | None) -> Tensor | None:
        mask = self._masks[self._in_decoder[index]]
        if mask is None:
            return None
        text = mask.flatten().to(values.device).bool()
        if tokens is not None and len(tokens) and len(text) > int(tokens.max()):
            text = text[tokens]
        if len(text) == values.shape[:-1].numel():
            return text
        if not torch.is_grad_enabled():  # decoding: the mask is also of tokens that were computed before
            return None
        raise ValueError(
            f"{self.blocks[index].name} received {values.shape[:-1].numel()} tokens, and attention_mask is "
            f"of {mask.numel()}, so padding cannot be told from text; give batches without padding, or "
            "a mask with one value for each token."
        )


def patched_or_all(model: nn.Module) -> Callable[[Block], bool]:
    """For ``only``: of a model that is patched in part, its patched blocks; of one that is not, all."""
    some = any(block.is_patched for block in require_blocks(model)[0])
    return lambda block: block.is_patched or not some


def in_decoder(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``model`` is in a decoder that has an encoder."""
    of_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(of_two) and "decoder" in name.split(".")


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by their names."""
    given = dict(kwargs)
    if args:
        given |= inspect.signature(module.forward).bind_partial(*args).arguments
    return given


def _masks(given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """That of padding in the only or first stack of blocks, and in a decoder after it."""
    first, second = (given.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return _of_padding(first), _of_padding(second)


def _length(given: Mapping[str, Any]) -> int | None:
    if any(name.startswith("decoder_") for name in given):
        return None
    found = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((one.shape[1] for one in found if isinstance(one, Tensor) and one.dim() > 1), None)


def _of_padding(mask: object) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
