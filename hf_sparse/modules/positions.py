"""Which position each token has that a model computes now: what a table with a row per position goes by.

A block is given neither positions nor masks. They are read off the arguments of the model around it, the one
that makes hidden states of tokens, by hooks; the block asks for them while that model runs. What gradient
checkpointing recomputes runs later, in the backward pass: there, the gradient of a layer's output brings the
positions of its forward back.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.errors import PatchError


class Tokens(NamedTuple):
    """The tokens that a model computes."""

    positions: Tensor
    """int64 ``[B, T]``, or ``[1, T]`` if all sequences have the same."""
    batch: int

    def of(self, x: Tensor) -> Tensor:
        """Positions that broadcast to the rows of ``x``, ``[B, T, D]`` or ``[B * T, D]``.

        Raises:
            RuntimeError: the rows of ``x`` are other tokens, or in another order.

        """
        positions, length = self.positions, self.positions.shape[-1]
        rows = x.shape[:-1]
        if len(rows) == 2 and rows[0] == self.batch and rows[1] == length:
            return positions.to(x.device)
        if len(rows) == 1 and rows[0] == self.batch * length:
            return positions.expand(self.batch, length).flatten().to(x.device)
        raise RuntimeError(
            f"an MLP block was given {tuple(x.shape)}, which is not all of the {self.batch} x {length} "
            "tokens of its model in their order; their positions, for a zeroth bias, are not known."
        )


class _Local(threading.local):
    """By thread: threads may run one model, and on a GPU the backward pass has threads of its own."""

    now: Tokens | None = None
    again: tuple[int, Tokens] | None = None
    """While layers are recomputed: which backward pass it is, and the tokens of the forward."""


class Positions:
    """The tokens of one model, whose hooks are methods of this; all its blocks hold it.

    Args:
        model: the innermost transformers model around the blocks.

    Raises:
        PatchError: its arguments do not say where tokens stand.

    """

    def __init__(self, model: PreTrainedModel) -> None:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        if not {"input_ids", "inputs_embeds"} & {*names} or not {"position_ids", "attention_mask"} & {*names}:
            raise PatchError(
                f"a zeroth bias needs the positions of tokens, and the forward of {type(model).__name__} is "
                "given none: it takes no input_ids and no attention_mask. Leave zeroth_bias out."
            )
        self._names = names
        self._local = _Local()
        self._compiled: Tokens | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        # Graphs read the second: what is thread-local is unknown to Dynamo if hooks run outside of the graph.
        self._local.now = self._compiled = self._tokens(given)

    def end(self, *_: object) -> None:
        """After it, also if it failed."""
        self._local.now = self._compiled = None

    def keep(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the forward of a layer, which may be recomputed."""
        if torch.compiler.is_compiling() or (now := self._local.now) is None:
            return
        for one in output if isinstance(output, tuple) else (output,):
            if isinstance(one, Tensor) and one.requires_grad:
                one.register_hook(partial(self._bring_back, now))
                return

    def of(self, x: Tensor) -> Tensor:
        """The positions of the rows of ``x``, see :meth:`Tokens.of`.

        Raises:
            RuntimeError: they are not known here.

        """
        if torch.compiler.is_compiling():
            tokens = self._compiled
        else:
            tokens, again = self._local.now, self._local.again
            if tokens is None and again is not None and again[0] == torch._C._current_graph_task_id() != -1:
                tokens = again[1]
        if tokens is None:
            raise RuntimeError(
                "an MLP block with a zeroth bias was called outside of the forward of its model, so that the "
                "positions of its tokens are not known: call the model. If a checkpoint recomputes it, use "
                "activation_checkpointing_kwargs={'use_reentrant': False}. If the block was moved here from "
                "another model, patch this one."
            )
        return tokens.of(x)

    def __deepcopy__(self, _: object) -> Positions:
        # Copies of a model do not run inside of each other, and PEFT copies a part of a block alone.
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=_Local(), _compiled=None)

    def _bring_back(self, tokens: Tokens, _: Tensor) -> None:
        self._local.again = torch._C._current_graph_task_id(), tokens

    def _tokens(self, given: Mapping[str, Any]) -> Tokens | None:
        ids = given.get("input_ids")
        if ids is None and (ids := given.get("inputs_embeds")) is None:
            return None  # the model itself says what is wrong
        batch, length = ids.shape[:2]
        positions = given.get("position_ids")
        if positions is not None:
            if positions.dim() > 2 or positions.shape[-1] != length:
                raise ValueError(
                    f"position_ids of shape {tuple(positions.shape)} do not give each of {length} tokens one "
                    "position, which a zeroth bias needs."
                )
            return Tokens(positions.view(-1, length), batch)
        past = given.get("past_key_values")
        before = 0 if past is None else past.get_seq_length()
        mask = given.get("attention_mask")
        here = torch.arange(length, device=ids.device) + before
        if mask is None:
            return Tokens(here[None], batch)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            if not isinstance(before, Tensor) and before + length > mask.shape[1]:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns for {before} tokens in the cache and "
                    f"{length} new ones; it has to go over all of them."
                )
            # Tokens count from the first that the mask keeps.
            counted = (mask != 0).cumsum(-1) - 1
            return Tokens(counted.clamp(min=0).index_select(1, here.to(mask.device)), batch)
        by_generate = "position_ids" not in self._names and getattr(past, "is_compileable", False)
        if isinstance(mask, Tensor) and mask.dim() == 4 and by_generate:
            # It makes such a mask for static caches, where T5 has no positions: a token sees those before it.
            seen = mask if mask.dtype == torch.bool else mask == 0
            return Tokens(seen[:, 0].sum(-1) - 1, batch)
        raise ValueError(
            f"attention_mask={_shape(mask)} does not say which position tokens have, for a zeroth bias: "
            "give position_ids, or a mask of shape (batch, tokens)."
        )


def stack_and_layer(model: PreTrainedModel, name: str) -> tuple[PreTrainedModel, nn.Module]:
    """The innermost model around the module ``name``, and the layer of it that the module is in."""
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:length])) for length in range(len(path))]
    depth, stack = [(n, one) for n, one in enumerate(around) if isinstance(one, PreTrainedModel)][-1]
    inside = range(depth + 1, len(path))
    return stack, next((around[n] for n in inside if path[n - 1].isdigit()), around[-1])


def listen(model: PreTrainedModel, name: str, known: dict[int, Positions]) -> Positions:
    """What tells the module ``name`` in ``model`` about positions, with its hooks in place.

    Args:
        model: a transformers model.
        name: of a block or a part of one.
        known: what was made before, of the same ``model``, by model inside of it.

    Raises:
        PatchError: see :class:`Positions`.

    """
    stack, layer = stack_and_layer(model, name)
    if (positions := known.get(id(stack))) is None:
        known[id(stack)] = positions = Positions(stack)
        stack.register_forward_pre_hook(positions.begin, with_kwargs=True)
        stack.register_forward_hook(positions.end, always_call=True)
    if not any(getattr(hook, "__self__", None) is positions for hook in layer._forward_hooks.values()):
        layer.register_forward_hook(positions.keep)
    return positions


def forget(module: nn.Module) -> None:
    """Take the hooks off a model or layer."""
    for hooks, settings in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Positions)]:
            del hooks[key]
            for setting in settings:
                setting.pop(key, None)


def _shape(mask: Any) -> str:
    return f"<{tuple(mask.shape)}>" if isinstance(mask, Tensor) else type(mask).__name__
