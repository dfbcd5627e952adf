"""Which MLP blocks a patch is for: by their numbers, or by patterns on their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hf_sparse.adapters import Block
from hf_sparse.checks import shown
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError

_SHOWN = 3

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """The blocks whose qualified name matches a pattern of ``include`` and none of ``exclude``.

    Names are such as ``model.layers.0.mlp``, patterns those of ``fnmatch``: ``*`` is anything, dots as well.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @staticmethod
    def of(include: Patterns, exclude: Patterns) -> Selection | None:
        """None if neither says anything.

        Raises:
            PatchError: they are no patterns.

        """
        given = [_patterns("include", include), _patterns("exclude", exclude)]
        return None if given == [(), ()] else Selection(*given)

    def resolve(self, config: SparsityConfig, blocks: Sequence[Block]) -> SparsityConfig:
        """``config`` for the selected blocks: what it keeps of a selection are their numbers.

        Raises:
            PatchError: a pattern matches no block, none is left, or ``config`` selects blocks itself.

        """
        if config.layers is not None:
            raise PatchError(
                f"layers={shown(config.layers)} and include or exclude both choose blocks; give one of them."
            )
        indices = self.indices(blocks)
        if len(indices) == len(blocks):
            return config
        for name, part in config.parts.items():
            if part.blocks not in (None, len(indices)):
                raise PatchError(
                    f"{name} has values for {part.blocks} blocks, but include and exclude select "
                    f"{len(indices)}; give one value, or one per selected block."
                )
        return config.changed(layers=indices)

    def indices(self, blocks: Sequence[Block]) -> tuple[int, ...]:
        """The numbers of the selected ones among ``blocks``.

        Raises:
            PatchError: a pattern matches none of them, or none is left.

        """
        names = [block.place for block in blocks]
        for field, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise PatchError(
                        f"{field}={pattern!r} matches no MLP block. Patterns are for the whole name, such as "
                        f"{_some(names)}; * stands for anything."
                    )
        found = tuple(index for index, name in enumerate(names) if self._selects(name))
        if not found:
            raise PatchError(f"exclude={list(self.exclude)} leaves no MLP block; there are {_some(names)}.")
        return found

    def _selects(self, name: str) -> bool:
        included = not self.include or any(fnmatchcase(name, one) for one in self.include)
        return included and not any(fnmatchcase(name, one) for one in self.exclude)


def _patterns(field: str, value: Patterns) -> tuple[str, ...]:
    if value is None:
        return ()
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not patterns or not all(isinstance(one, str) and one for one in patterns):
        raise PatchError(
            f'{field}={value!r} is no pattern or sequence of patterns on names of blocks, such as "*.0.mlp".'
        )
    return patterns


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
