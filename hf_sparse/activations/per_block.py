"""Parts of a config that may have one value for all blocks, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hf_sparse.errors import PatchError
from hf_sparse.parts import Part

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

Self = TypeVar("Self", bound="PerBlock")


@dataclass(frozen=True, repr=False)
class PerBlock(Part):
    """A part with fields that may be tuples, a value for each patched block."""

    each: ClassVar[tuple[str, ...]]
    """The names of these fields; a part has one of them."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"

    @property
    def blocks(self) -> int | None:
        values = [getattr(self, name) for name in self.each]
        return next((len(value) for value in values if isinstance(value, tuple)), None)

    def arranged(self: Self, order: Sequence[int]) -> Self:
        return self._changed(lambda values: tuple(values[i] for i in order))

    def at(self: Self, index: int) -> Self:
        """With the values of the ``index``-th patched block."""
        return self._changed(lambda values: values[index])

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self._given().items()}

    def gathered(self: Self, found: Sequence[Self | None], blocks: Sequence[Block]) -> Self:
        """The part that says what was ``found`` in each of ``blocks``.

        Raises:
            PatchError: no part can say it.

        """
        first, kinds = found[0], [one and one._kind() for one in found]
        if first is None or kinds.count(kinds[0]) != len(kinds):
            other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0)
            raise PatchError(
                f"a config can say one kind of {type(self).__name__}, but there is {first} at "
                f"{blocks[0].name} and {found[other]} at {blocks[other].name}. Patch the model again."
            )
        if self.blocks is None and all(one == first for one in found):
            return first
        (name,) = (name for name in self.each if getattr(first, name) is not None)
        return replace(first, **{name: tuple(getattr(one, name) for one in found)})

    def _changed(self: Self, change: Callable[[tuple[Any, ...]], Any]) -> Self:
        values = {name: getattr(self, name) for name in self.each}
        return replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, tuple)})

    def _kind(self) -> dict[str, Any]:
        """What cannot differ between blocks: all but the values in :attr:`each`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v is None if k in self.each else v for k, v in values.items()}

    def _given(self) -> dict[str, Any]:
        """The arguments that make this part; those with their default are left out."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
