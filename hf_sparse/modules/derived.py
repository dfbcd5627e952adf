"""What is made of a weight and kept beside it: made when it is first of use, dropped when in doubt.

It is true of a weight as it was, so it may be used only while the weight is known not to have changed.
torch counts changes in place, but not those through ``weight.data``, nor those of a buffer that a weight was
gathered into. What is not counted can be done only by somebody who holds the weight, its module or its
memory, if weakly. Hence :meth:`Derived.of` is asked only while nobody but the owner does, and the owner drops
what it has whenever somebody gets to its weight (:mod:`hf_sparse.modules.guarded`). That may be in another
thread, after the question and before the answer is of use: :attr:`Derived.mark` tells.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from triton_ops.certificate import weight_stamp

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Held(Generic[T]):
    """What was made of one weight as it was. Not a buffer: it must not be saved or converted."""

    value: T
    stamp: tuple[int, int]
    """:func:`triton_ops.certificate.weight_stamp` of the weight."""
    weight: weakref.ref[Tensor]
    """Weak, for a weight that was replaced should not be kept alive."""
    storage: StorageWeakRef
    """Makes the storage's identity in ``stamp`` last: no later storage can have the same."""
    mark: object
    """The mark when nobody else held the weight."""


class Derived(Generic[T]):
    """What ``make`` made of a weight, as long as it is that of the weight."""

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._made_by = make
        self._held: _Held[T] | None = None
        self.mark = object()
        """Another one after each :meth:`drop`. To be read before asking who holds the weight."""

    def drop(self) -> None:
        """Forget it; the next call that has a use for it makes it anew."""
        self.mark = object()  # before, so that what is being made now is not kept
        self._held = None

    @property
    def is_held(self) -> bool:
        """Whether there is something to drop."""
        return self._held is not None

    def of(self, weight: Tensor, since: object) -> tuple[T, tuple[int, int]] | None:
        """That of ``weight``, which nobody else held when :attr:`mark` was ``since``, and the weight's stamp.

        None where no change of it could be noticed, on the meta device, and if somebody got to the weight
        meanwhile. A graph that is compiled can neither make it nor ask a weight for its version, and gets
        what is held.
        """
        if not torch.compiler.is_compiling() and not self._holds_for(weight):
            self._held = self._make(weight, since)
            if self.mark is not since:
                self._held = None
        held = self._held
        return None if held is None else (held.value, held.stamp)

    def _holds_for(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the very one, unchanged as far as is counted, in the same dtype and place."""
        held = self._held
        return (
            held is not None
            and held.mark is self.mark
            and held.weight() is weight
            and not weight.is_inference()
            and held.stamp == weight_stamp(weight)
        )

    def references(self, weight: Tensor) -> int:
        """How many weak references to ``weight`` this one has."""
        held = self._held
        return int(held is not None and held.weight() is weight)

    def _make(self, weight: Tensor, mark: object) -> _Held[T] | None:
        if weight.is_inference() or weight.is_meta:
            return None
        with torch.inference_mode(False):  # what is made in inference mode could be used only there
            storage = StorageWeakRef(weight.untyped_storage())
            # With a callback it is an object of its own, so that others can be counted.
            reference = weakref.ref(weight, lambda _: None)
            return _Held(self._made_by(weight), weight_stamp(weight), reference, storage, mark)
