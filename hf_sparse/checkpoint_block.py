"""The ``"hf_sparse"`` block of a model's ``config.json``: what was patched, and what to go back to.

The block is untrusted input when it comes from a checkpoint; reading it validates every field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from hf_sparse.activations import is_stock
from hf_sparse.activations.config import ORIGINAL
from hf_sparse.checks import MAX_BLOCKS, mapping, shown
from hf_sparse.config import SparsityConfig

KEY = "hf_sparse"
"""Name of the block, and of an activation and a fusion that stock transformers does not know."""

FUSIONS = "fusion_config"
"""The field by which transformers 5 refuses to load a model, if it names a fusion that is not known."""


@dataclass(frozen=True)
class Record:
    """What the block says."""

    config: SparsityConfig
    blocks: int | None
    """How many MLP blocks the model has, patched or not, where ``config`` tells them apart by their number;
    None where it says the same of all."""
    field: str | None
    """The config field that names the activation, such as ``"hidden_act"``; None where no field of the config
    does, or none that may say ``"hf_sparse"``."""
    activation: str | None
    """The value that field had before. Without a field, the name of the activation that their class has;
    None if transformers has no name for it, or blocks differ."""

    @staticmethod
    def of(config: SparsityConfig, blocks: int, field: str | None, activation: str | None) -> Record:
        """The record of a model with ``blocks`` MLP blocks."""
        return Record(config, None if config.uniform else blocks, field, activation)

    def to_dict(self) -> dict[str, Any]:
        count = {} if self.blocks is None else {"blocks": self.blocks}
        stock = {"field": self.field, "activation": self.activation}
        return {**self.config.to_dict(), **count, "stock": stock}

    def write(self, config: PretrainedConfig, *, stock_name: str | None) -> None:
        """Put the block and the activation field into ``config``.

        ``stock_name`` is the activation with which stock transformers builds the very same model. Where
        there is none, the field says ``"hf_sparse"``, so that transformers without this package refuses
        the checkpoint instead of silently running another model. Where there is no field, a fusion of that
        name does the same.
        """
        setattr(config, KEY, self.to_dict())
        if self.field is not None:
            setattr(config, self.field, stock_name or KEY)
        else:
            refuse_elsewhere(config, stock_name is None)

    def erase(self, config: PretrainedConfig) -> None:
        """Put ``config`` back to what it was before the patch."""
        delattr(config, KEY)
        if self.field is not None:
            setattr(config, self.field, self.activation)
        else:
            refuse_elsewhere(config, False)

    def stock_name_in(self, config: PretrainedConfig) -> str | None:
        """The activation as which stock transformers loads ``config``; None if it refuses it."""
        if self.field is None:
            new = self.config.activation
            same = new.name == ORIGINAL or (new.name == self.activation and new.mix == 1)
            known = same and not self.config.others and not refused_elsewhere(config)
            return self.activation if known else None
        value: str = vars(config)[self.field]
        return None if value == KEY else value

    def agree(self, config: PretrainedConfig) -> None:
        """Refuse an activation field that says something else than the block.

        Raises:
            ValueError: names both.

        """
        if self.field is None:
            return
        activation, layers = self.config.activation, self.config.layers
        may_be: list[str | None] = [KEY]
        if activation.name == ORIGINAL:
            may_be.append(self.activation)
        elif is_stock(activation.name) and activation.mix == 1 and not self.config.others:
            every_block = layers is None or len(layers) == self.blocks
            if every_block or activation.name == self.activation:
                may_be.append(activation.name)
        value = vars(config).get(self.field)
        if value not in may_be:
            raise ValueError(
                f"{self.field}={shown(value)} contradicts it: with {activation} the field says "
                f"{' or '.join(map(repr, may_be))}. Set it so, or take the block out of the config."
            )


def has(config: PretrainedConfig) -> bool:
    """Whether ``config`` has the block, whatever it says."""
    return KEY in vars(config)


def refused_elsewhere(config: PretrainedConfig) -> bool:
    """Whether ``config`` names our fusion, so that transformers 5 alone does not load it."""
    return _fusions(config).get(KEY) is True


def refuse_elsewhere(config: PretrainedConfig, refuse: bool) -> None:
    """Let ``config`` name our fusion, or not; other fusions stay."""
    if refuse == refused_elsewhere(config):
        return
    others = {name: value for name, value in _fusions(config).items() if name != KEY}
    if fusions := {**others, KEY: True} if refuse else others:
        setattr(config, FUSIONS, fusions)
    else:
        delattr(config, FUSIONS)


def read(config: PretrainedConfig) -> Record | None:
    """The record in ``config``, None if there is none.

    Raises:
        ValueError: the block is malformed or from a newer version.

    """
    if not has(config):
        return None
    with refusing():
        values = mapping("it", vars(config)[KEY])
        counted, blocks, stock = "blocks" in values, values.pop("blocks", None), values.pop("stock", None)
        if stock is None or set(stock := mapping("stock", stock)) != {"field", "activation"}:
            raise ValueError(f'stock={shown(stock)} is not {{"field": ..., "activation": ...}}.')
        field, activation = stock["field"], stock["activation"]
        named = isinstance(activation, str) and is_plain(activation)
        if not named and not (field is None and activation is None):
            raise ValueError(f"stock.activation={shown(activation)} is not one that transformers knows.")
        if field is not None and not (isinstance(field, str) and names_activation(vars(config).get(field))):
            raise ValueError(
                f"stock.field={shown(field)} is no field of {type(config).__name__} that names an activation."
            )
        sparsity = SparsityConfig.from_dict(values)
        if sparsity.uniform and counted:
            raise ValueError(
                f"blocks={shown(blocks)} has no meaning in a config that says the same of all blocks; leave "
                "it out."
            )
        if not sparsity.uniform and not (type(blocks) is int and 1 <= blocks <= MAX_BLOCKS):
            raise ValueError(f"blocks={shown(blocks)} is not the number of MLP blocks of a model.")
        return Record(sparsity, blocks, field, activation)


def names_activation(value: object) -> bool:
    """Whether a config's field with this value may be the one that names the activation."""
    return isinstance(value, str) and (value == KEY or value in ACT2FN)


def is_plain(name: str) -> bool:
    """Whether transformers makes a plain function of the name: one with parameters is none to go back to."""
    if name == KEY or name not in ACT2FN:
        return False
    try:
        return not ACT2FN[name].state_dict()
    except Exception:  # it needs a package that is not here
        return False


def _fusions(config: PretrainedConfig) -> Mapping[str, Any]:
    fusions = vars(config).get(FUSIONS)
    return fusions if isinstance(fusions, Mapping) else {}


@contextmanager
def refusing() -> Iterator[None]:
    """Errors in here say that it is the block of the config that cannot be used."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'the "{KEY}" block of the model config cannot be used: {error}') from error
