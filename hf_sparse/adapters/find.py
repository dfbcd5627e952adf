"""Walk a model and list its MLP blocks, and what looks like one but is not understood."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_sparse.adapters.block import Block
from hf_sparse.adapters.bottleneck import bottlenecks
from hf_sparse.adapters.copies import idle, in_use, place
from hf_sparse.adapters.kept import Kept, own_roles
from hf_sparse.adapters.known import Children, Known
from hf_sparse.adapters.probe_kept import recognise_kept
from hf_sparse.adapters.roles import Roles
from hf_sparse.adapters.shapes import SHAPES, is_stacked, recognise
from hf_sparse.errors import PatchError

_NARROW = "it is an adapter or a gate: fewer neurons than hidden units, and a wider network in its layer"


@dataclass(frozen=True)
class Skipped:
    """A module that owns an activation but is not an MLP block of a known shape; it stays as it is."""

    name: str
    class_name: str
    reason: str


def find_blocks(model: nn.Module, without: Collection[nn.Module] = ()) -> tuple[list[Block], list[Skipped]]:
    """MLP blocks of ``model`` inside its repeated layers, stock or patched, in ``named_modules`` order.

    Only modules that are, or are in, a numbered child (as those of a ``ModuleList`` are) count: a
    classification head or a projector is not a layer's MLP. Of a block that PEFT keeps copies of
    (``modules_to_save``), the one in use is found; the others are its ``spares``. What is in one of the
    modules ``without`` is not looked at.
    """
    blocks: list[Block] = []
    skipped: list[Skipped] = []
    inside: tuple[str, ...] = ()
    known = Known()
    used = list(in_use(model, without=without))
    for name, module in used:
        if _is_part(module) or f"{name}.".startswith(inside) or not _in_layers(name):
            continue
        roles = _roles(module, known)
        if roles is not None:
            blocks.append(Block(name, module, roles))
            inside = (*inside, *_taken(name, roles))
        elif (children := known.children(module)).owns_activation and (reason := _why_not(module, children)):
            skipped.append(Skipped(name, type(module).__name__, reason))
    narrow = bottlenecks(blocks, used)
    skipped += [Skipped(b.name, type(b.module).__name__, _NARROW) for b in narrow]
    return _with_spares(model, used, [block for block in blocks if block not in narrow]), skipped


def require_blocks(model: nn.Module) -> tuple[list[Block], list[Skipped]]:
    """What :func:`find_blocks` finds.

    Raises:
        PatchError: it finds no block; the message says what there is instead.

    """
    blocks, skipped = find_blocks(model)
    if not blocks:
        seen = sorted({f"{s.class_name} at {s.name}: {s.reason}" for s in skipped})[:3]
        found = "; ".join(seen) or "no module in a layer owns projections and an activation"
        raise PatchError(
            f"no MLP block of a known shape in {type(model).__name__}. Known, with one "
            f"activation: {'; '.join(shape.formula for shape in SHAPES)}. Found: {found}."
        )
    return blocks, skipped


def _is_part(module: nn.Module) -> bool:
    """Whether ``module`` has nothing that an MLP could be made of: most modules of a model."""
    # Most of all are these, or have one parameter; and a look at a parameter takes longer than all this.
    few = len(module._parameters) < 2 or type(module) is nn.Linear
    return not module._modules and (few or not is_stacked(module))


def _in_layers(name: str) -> bool:
    return any(part.isdigit() for part in place(name).split("."))


def _roles(module: nn.Module, known: Known) -> Roles | None:
    # A patched block says itself which child plays which part.
    return own_roles(module) or recognise(module, known) or recognise_kept(module, known)


def _taken(name: str, roles: Roles) -> set[str]:
    """Names, with a dot, of modules that have no other block in them."""
    if not isinstance(roles, Kept):
        return {f"{name}."}
    # The module may be a whole layer, with other MLPs.
    return {f"{name}.{part.rpartition('.')[0]}." for part in (roles.act, roles.down) if "." in part}


def _with_spares(model: nn.Module, used: Sequence[tuple[str, nn.Module]], blocks: list[Block]) -> list[Block]:
    others = list(idle(model, used))
    if not others:
        return blocks
    spares: dict[str, list[Block]] = {block.place: [] for block in blocks}
    for name, module in others:
        if (same := spares.get(place(name))) is not None and (roles := _roles(module, Known())) is not None:
            same.append(Block(name, module, roles))
    return [replace(block, spares=tuple(spares[block.place])) for block in blocks]


def _why_not(module: nn.Module, children: Children) -> str | None:
    sizes = children.linears
    shown = ", ".join(f"{name} {i}->{o}" for name, (i, o) in sizes.items())
    if len(sizes) in (2, 3):
        return (
            f"its forward is none of {'; '.join(shape.formula for shape in SHAPES)}; linear layers: {shown}"
        )
    if sizes:
        return f"it has {len(sizes)} linear layers where an MLP has two or three: {shown}"
    if any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return "its weights are stacked experts that compute something else than this version knows"
    return None
