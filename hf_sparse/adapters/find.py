"""Walk a model and list its MLP blocks, and what looks like one but is not understood."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_sparse.activations.known import STOCK_ACTIVATIONS
from hf_sparse.adapters.block import Block
from hf_sparse.adapters.roles import Roles
from hf_sparse.adapters.shapes import linears, recognise


@dataclass(frozen=True)
class Skipped:
    """A module that owns an activation but is not an MLP block of a known shape; it stays as it is."""

    name: str
    class_name: str
    reason: str


def find_blocks(model: nn.Module) -> tuple[list[Block], list[Skipped]]:
    """MLP blocks of ``model`` inside its repeated layers, stock or patched, in ``named_modules`` order.

    Only modules that are, or are in, a numbered child (as those of a ``ModuleList`` are) count: a
    classification head or a projector is not a layer's MLP.
    """
    blocks: list[Block] = []
    skipped: list[Skipped] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) or not any(part.isdigit() for part in name.split(".")):
            continue
        # A patched block says itself which child plays which part.
        roles = own if isinstance(own := vars(module).get("roles"), Roles) else recognise(module)
        if roles is not None:
            blocks.append(Block(name, module, roles))
        else:
            owns_activation = any(isinstance(child, STOCK_ACTIVATIONS) for child in module.children())
            if owns_activation and (reason := _why_not(module)):
                skipped.append(Skipped(name, type(module).__name__, reason))
            continue
        inside = (*inside, name + ".")
    return blocks, skipped


def _why_not(module: nn.Module) -> str | None:
    sizes = linears(module)
    shown = ", ".join(f"{name} {i}->{o}" for name, (i, o) in sizes.items())
    if len(sizes) in (2, 3):
        return (
            f"its forward is neither down(act(gate(x)) * up(x)) nor down(act(up(x))); linear layers: {shown}"
        )
    if sizes:
        return f"it has {len(sizes)} linear layers where an MLP has two or three: {shown}"
    if any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return "its weights are stacked experts, which this version does not patch"
    return None
