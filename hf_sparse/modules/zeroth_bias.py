"""Zeroth biases: a vector for each position, added to the tokens that an MLP block is given, or gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_sparse.adapters.copies import active
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.roles import shape
from hf_sparse.adapters.walk import modules_of
from hf_sparse.checks import known, mapping, shown
from hf_sparse.errors import PatchError
from hf_sparse.modules.leaf import ParameterLeaf
from hf_sparse.modules.positions import Positions, forget, listen, stack_and_layer
from hf_sparse.modules.sparse_block import SparseBlock
from hf_sparse.parts import Part
from hf_sparse.windows import context_length

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

NAME = "zeroth_bias"
"""Of the part in a config, and of the child of a block."""

PLACEMENTS = ("input", "output")

_MOST = 1 << 20
"""More positions than tables are made for."""


class ZerothBias(ParameterLeaf):
    """``x + D[position]``: the rows of a table ``D [P, D]``, which is zero at first.

    Tokens beyond the table get no bias. The parameter is called ``bias``: optimisers that go by names decay
    no such one.
    """

    source: Positions | None = None
    """Says which positions tokens have; None until the block is in a model."""

    def __init__(self, hidden: int, positions: int, placement: str, **made: Any) -> None:
        super().__init__()
        self.positions, self.placement = positions, placement
        self.bias = nn.Parameter(torch.empty(positions, hidden, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., D] -> [..., D]``, in the dtype of ``x``."""
        if self.source is None:
            raise RuntimeError("this zeroth bias is in no model that was patched with it; patch the model.")
        positions = self.source.of(x)
        rows = F.embedding(positions.clamp(0, self.positions - 1), self.bias)
        return x + rows.masked_fill((positions >= self.positions).unsqueeze(-1), 0).to(x.dtype)

    def extra_repr(self) -> str:
        return f"positions={self.positions}, placement={self.placement!r}"


@dataclass(frozen=True)
class ZerothBiasConfig(Part):
    """A zeroth bias (doubly biased MLP; arXiv 2309.03004, 2605.25612) in each patched block.

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and the mend.

    """

    placement: str = "input"
    """``"input"``: added to what the projections of a block are given, as in the papers; ``"output"``: to
    what the block gives, as in the code that their authors released."""

    positions: int | None = None
    """Rows of the table, from position 0; tokens beyond get no bias. None means all positions of the model.
    """

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"{NAME}.placement={shown(self.placement)} is not known; choose one of "
                f"{', '.join(PLACEMENTS)}."
            )
        rows = self.positions
        if rows is not None and not (type(rows) is int and 1 <= rows <= _MOST):
            raise ValueError(f"{NAME}.positions={shown(rows)} is not a number of positions, 1 to {_MOST}.")

    @property
    def site(self) -> Literal["x", "y"]:
        """Where it acts in a block."""
        return "x" if self.placement == "input" else "y"

    @classmethod
    def read(cls, value: Any) -> ZerothBiasConfig:
        if isinstance(value, cls):
            return value
        given = mapping(NAME, value)
        known(NAME, list(given), list(cls.__dataclass_fields__))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        placement = {} if self.placement == "input" else {"placement": self.placement}
        return {**placement, **({} if self.positions is None else {"positions": self.positions})}

    def check(self, block: Block) -> None:
        if isinstance(block.roles, Experts):
            raise PatchError(
                f"{NAME} goes by the position of tokens, but {block.name} ({block.stock_class.__name__}) is "
                f"given those that are routed to it; leave {NAME} out, or these blocks (exclude=)."
            )

    def fitted(self, model: PreTrainedModel, blocks: Sequence[Block]) -> ZerothBiasConfig:
        for stack in {stack_and_layer(model, block.name)[0] for block in blocks}:
            Positions(stack)
        if self.positions is not None:
            return self
        rows = context_length(model)
        if rows is None:
            raise PatchError(
                f"{NAME}.positions is not given, and the config of {type(model).__name__} does not say how "
                "many positions it has: give the length of the sequences to train on, such as positions=512."
            )
        size = sum(rows * block.hidden_size for block in blocks)
        whole = sum(torch.Size(shape(parameter)).numel() for parameter in model.parameters())
        if size > whole:
            raise PatchError(
                f"{NAME}.positions is not given, and tables for all {rows} positions of the model have "
                f"{size:,} parameters, more than the model ({whole:,}): give the length of the sequences to "
                "train on, such as positions=512. Tokens beyond get no bias."
            )
        return replace(self, positions=rows)

    def rehearse(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        from hf_sparse.rehearsal import Rehearsal  # it needs what reads configs

        rehearsal = Rehearsal(model)
        heard: dict[int, Positions] = {}
        seen: set[str] = set()

        def look(place: str, positions: Positions, x: Tensor, _: Tensor | None) -> None:
            positions.of(x)
            seen.add(place)

        for block in blocks:
            copy = rehearsal.block(block.place)
            look_there = partial(look, block.place, listen(rehearsal.model, copy.name, heard))
            copy.watch("x", look_there)
        rehearsal.run()
        rehearsal.require(seen, [block.place for block in blocks], f"a {NAME}")

    def build(self, mlp: nn.Module, index: int) -> None:
        assert isinstance(mlp, SparseBlock)
        assert self.positions is not None, "fitted to the model"
        hidden, _ = mlp.roles.sizes(mlp)
        like = next(mlp.stock.parameters())
        dtype = like.dtype if like.is_floating_point() else None  # of a quantised one
        leaf = ZerothBias(hidden, self.positions, self.placement, device=like.device, dtype=dtype)
        mlp.zeroth_bias = leaf.train(mlp.training)
        mlp.leaves = {**mlp.leaves, NAME: self.site}

    def found_in(self, blocks: Sequence[Block]) -> ZerothBiasConfig:
        found = []
        for block in blocks:
            leaf = block.module._modules.get(NAME)
            leaf = None if leaf is None else active(leaf)
            if not isinstance(leaf, ZerothBias):
                raise PatchError(
                    f"the config of the model says that its blocks have a {NAME}, but {block.name} has none. "
                    "Patch the model again, or hf_sparse.unpatch(model)."
                )
            found.append(ZerothBiasConfig(leaf.placement, leaf.positions))
        if other := [i for i, one in enumerate(found) if one != found[0]]:
            raise PatchError(
                f"the zeroth biases of the patched blocks differ: {found[0]} at {blocks[0].name}, "
                f"{found[other[0]]} at {blocks[other[0]].name}; a config can say one kind."
            )
        return found[0]


def follow(model: PreTrainedModel) -> None:
    """Tell the zeroth biases in ``model`` where to ask for positions, and nothing else any more."""
    modules = modules_of(model)
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks:
            forget(module)
    if not any(isinstance(module, ZerothBias) for module in modules):
        return
    known: dict[int, Positions] = {}
    for name, leaf in model.named_modules():
        if isinstance(leaf, ZerothBias):
            leaf.source = listen(model, name, known)
