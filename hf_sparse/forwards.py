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

    Raises:
        PatchError: no MLP block of a known shape is found in ``model``.

    """

    blocks: list[Block]
    running: bool
    """Whether a forward runs. If not, ``seen`` is called by gradient checkpointing, which recomputes a layer
    during backward, and gets what it has got before."""

    def __init__(
        self, model: nn.Module, site: Site, seen: Seen, *, begin: Callable[[], None] = lambda: None
    ) -> None:
        self.blocks, _ = require_blocks(model)
        self.running = False
        self._seen, self._begin_of = seen, begin
        self._in_decoder = [in_decoder(model, block.name) for block in self.blocks]
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            *(block.watch(site, partial(self._pass, i)) for i, block in enumerate(self.blocks)),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._masks = _masks(module, args, kwargs)
        self.running = True
        self._begin_of()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False

    def _pass(self, index: int, values: Tensor, tokens: Tensor | None) -> None:
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


def in_decoder(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``model`` is in a decoder that has an encoder."""
    of_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(of_two) and "decoder" in name.split(".")


def _masks(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """That of padding in the only or first stack of blocks, and in a decoder after it."""
    given = dict(kwargs)
    if len(args) > 1:
        given |= inspect.signature(module.forward).bind_partial(*args).arguments
    first, second = (given.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return _of_padding(first), _of_padding(second)


def _of_padding(mask: object) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
