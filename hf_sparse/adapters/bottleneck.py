"""Networks with the structure of a plain MLP that are none: adapters, and the gates of gated norms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from hf_sparse.adapters.block import Block
from hf_sparse.adapters.copies import place
from hf_sparse.adapters.known import Children
from hf_sparse.adapters.plain import Plain


def bottlenecks(blocks: Sequence[Block], modules: Iterable[tuple[str, nn.Module]]) -> list[Block]:
    """Those of ``blocks`` that narrow their input and have a wider network beside them in their layer.

    Low-rank helpers compute what a plain MLP does. But they have fewer neurons than hidden units, and stand
    in a layer that has its own MLP, be it of a known shape or not. A narrow MLP without a wider one beside it
    is the layer's; gated ones are left out, for shared experts are narrow.

    Args:
        blocks: what was found in a model.
        modules: the modules of the model, by their qualified names.

    """
    narrow = [block for block in blocks if type(block.roles) is Plain and _narrows(block)]
    if not narrow:
        return []
    widths: dict[str, int] = {}  # of the widest network in a layer
    found = {block.name: block.intermediate_size for block in blocks}
    for name, module in modules:
        if name not in found and (children := Children.of(module)).owns_activation:
            found[name] = max((size for _, size in children.linears.values()), default=0)
    for name, width in found.items():
        widths[layer_of(name)] = max(widths.get(layer_of(name), 0), width)
    return [block for block in narrow if block.intermediate_size < widths[layer_of(block.name)]]


def _narrows(block: Block) -> bool:
    return block.intermediate_size < block.hidden_size


def layer_of(name: str) -> str:
    """The outermost numbered module, as those of a ``ModuleList`` are, that ``name`` is or is in."""
    parts = place(name).split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def by_layer(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """``blocks`` by the layers that they are in, as :func:`layer_of` names these."""
    layers: dict[str, list[Block]] = {}
    for block in blocks:
        layers.setdefault(layer_of(block.name), []).append(block)
    return layers
