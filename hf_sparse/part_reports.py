"""What the parts of a model are and how they are patched, as reports."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_sparse import checkpoint_block
from hf_sparse.adapters import Block, Skipped
from hf_sparse.adapters.block import replaced_around
from hf_sparse.checkpoint_block import Record
from hf_sparse.composite import Part, find_part, inner_models, parts_of
from hf_sparse.config import SparsityConfig
from hf_sparse.described import described_part
from hf_sparse.errors import PatchError
from hf_sparse.patch_report import PatchReport


def patched_parts(base: PreTrainedModel, part: str | None, what: str = "") -> list[tuple[Part, Record]]:
    """The parts that are patched, of all or the named one, with what their configs say.

    Raises:
        PatchError: there is none.

    """
    parts = parts_of(base) if part is None else [find_part(base, part)]
    records = [(one, checkpoint_block.read(one.config)) for one in parts]
    if found := [(one, record) for one, record in records if record is not None]:
        return found
    which = f"the part {part!r} of this" if part is not None else "this"
    raise PatchError(
        f"{what}{which} {type(base).__name__} is not patched: its config has no hf_sparse block."
    )


def blocks_of(part: Part) -> tuple[list[Block], list[Skipped]]:
    """What there is in all models of a part."""
    found = [part.blocks(index) for index in range(len(part.models))]
    return [block for blocks, _ in found for block in blocks], [
        one for _, skipped in found for one in skipped
    ]


def inspected(base: PreTrainedModel, part: Part) -> PatchReport:
    """What there is in ``part``, and how it is patched now.

    Raises:
        PatchError: see :func:`hf_sparse.inspect`.

    """
    blocks, skipped = blocks_of(part)
    record = described_part(part)
    if record is None:
        return report(base, part, None, blocks, skipped)
    blocks = [block for block in blocks if block.is_patched]
    name = record.stock_name_in(part.config)
    return report(base, part, record.config, blocks, skipped, record, name)


def report(
    base: PreTrainedModel,
    part: Part,
    config: SparsityConfig | None,
    blocks: Sequence[Block],
    skipped: Sequence[Skipped],
    record: Record | None = None,
    name: str | None = None,
) -> PatchReport:
    """The report on a part that is patched as ``config`` says, or not if that is None."""
    of_several = part.name if part.path or inner_models(base) else None
    original, field = (None, None) if record is None else (record.activation, record.field)
    if original is None and config is not None:  # transformers has no name for it, or blocks differ
        acts = {block.original_activation for block in blocks if block.is_patched}
        original = " or ".join(sorted({type(act).__name__ for act in acts}))
    notes = around(base, blocks)
    return PatchReport(type(base).__name__, config, blocks, skipped, original, name, field, of_several, notes)


def around(base: PreTrainedModel, blocks: Sequence[Block]) -> list[str]:
    """That modules around ``blocks`` run something else than their class, which may leave the blocks out."""
    return [
        f"the forward of a module around {count} MLP blocks was replaced by {by}; does it call them?"
        for by, count in replaced_around(base, blocks).items()
    ]
