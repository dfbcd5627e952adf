"""The description of one MLP block: which child plays which part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_sparse.adapters.copies import place
from hf_sparse.adapters.roles import Roles


@dataclass(frozen=True)
class Block:
    """An MLP block in a model, stock or patched."""

    name: str
    """Qualified name, as in ``model.get_submodule(name)``."""
    module: nn.Module
    roles: Roles
    spares: tuple[Block, ...] = ()
    """Copies in the same place that are not in use now, as PEFT's ``modules_to_save`` keeps them."""

    @property
    def place(self) -> str:
        """The name that the block has in the model that its config builds, without PEFT's copies."""
        return place(self.name)

    @property
    def kind(self) -> Literal["gated", "plain"]:
        return self.roles.kind

    @property
    def stock_class(self) -> type[nn.Module]:
        """The class that transformers gave the block."""
        return getattr(self.module, "stock_class", type(self.module))

    @property
    def gate_linear(self) -> nn.Module | None:
        return None if self.roles.gate is None else self.module.get_submodule(self.roles.gate)

    @property
    def up_linear(self) -> nn.Module:
        return self.module.get_submodule(self.roles.up)

    @property
    def down_linear(self) -> nn.Module:
        """The down projection; sparsity is the share of exact zeros in its input."""
        return self.module.get_submodule(self.roles.down)

    @property
    def activation(self) -> nn.Module:
        return self.module.get_submodule(self.roles.act)

    @property
    def hidden_size(self) -> int:
        size = linear_size(self.up_linear)
        assert size is not None
        return size[0]

    @property
    def intermediate_size(self) -> int:
        size = linear_size(self.up_linear)
        assert size is not None
        return size[1]


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """``(in, out)`` of anything that acts as a linear layer, None of anything else.

    Declared sizes and not the weight's shape: under ZeRO-3 a weight has shape (0,), and quantised or
    LoRA-wrapped layers keep the declaration.
    """
    for fan_in, fan_out in (("in_features", "out_features"), ("nx", "nf")):
        size = getattr(module, fan_in, None), getattr(module, fan_out, None)
        if isinstance(size[0], int) and isinstance(size[1], int):
            return size[0], size[1]
    return None
