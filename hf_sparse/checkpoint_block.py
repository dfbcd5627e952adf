"""The ``"hf_sparse"`` block of a model's ``config.json``: what was patched, and what to go back to.

The block is untrusted input when it comes from a checkpoint; reading it validates every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from hf_sparse.config import SparsityConfig

KEY = "hf_sparse"
"""Name of the block, and of the activation that stock transformers does not know."""


@dataclass(frozen=True)
class Record:
    """What the block says."""

    config: SparsityConfig
    blocks: int
    """How many MLP blocks the model has, patched or not; ``layers`` and ``threshold`` count along them."""
    field: str
    """The config field that names the activation, such as ``"hidden_act"``."""
    activation: str
    """The value that field had before."""

    def to_dict(self) -> dict[str, Any]:
        stock = {"field": self.field, "activation": self.activation}
        return {**self.config.to_dict(), "blocks": self.blocks, "stock": stock}

    def write(self, config: PretrainedConfig, *, stock_name: str | None) -> None:
        """Put the block and the activation field into ``config``.

        ``stock_name`` is the activation with which stock transformers builds the very same model. Where
        there is none, the field says ``"hf_sparse"``, so that transformers without this package refuses
        the checkpoint instead of silently running another model.
        """
        setattr(config, KEY, self.to_dict())
        setattr(config, self.field, stock_name or KEY)

    def erase(self, config: PretrainedConfig) -> None:
        """Put ``config`` back to what it was before the patch."""
        delattr(config, KEY)
        setattr(config, self.field, self.activation)


def read(config: PretrainedConfig) -> Record | None:
    """The record in ``config``, None if there is none.

    Raises:
        ValueError: the block is malformed or from a newer version.

    """
    data = getattr(config, KEY, None)
    if data is None:
        return None
    try:
        if not isinstance(data, Mapping):
            raise ValueError(f"it is a {type(data).__name__}, not a mapping.")
        rest = dict(data)
        blocks, stock = rest.pop("blocks", None), rest.pop("stock", None)
        if type(blocks) is not int or blocks < 1:
            raise ValueError(f"blocks={blocks!r} is not a positive number of MLP blocks.")
        if not isinstance(stock, Mapping) or set(stock) != {"field", "activation"}:
            raise ValueError(f'stock={stock!r} is not {{"field": ..., "activation": ...}}.')
        field, activation = stock["field"], stock["activation"]
        if not isinstance(activation, str) or activation == KEY or activation not in ACT2FN:
            raise ValueError(f"stock activation {activation!r} is not one that transformers knows.")
        if not isinstance(field, str) or not isinstance(vars(config).get(field), str):
            raise ValueError(f"stock field {field!r} is not a field of {type(config).__name__}.")
        return Record(SparsityConfig.from_dict(rest), blocks, field, activation)
    except ValueError as error:
        raise ValueError(f'the "{KEY}" block of the model config cannot be used: {error}') from error
