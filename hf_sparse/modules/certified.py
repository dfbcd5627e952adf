"""The certificate of a block's deciding projection: made when it is first of use, dropped when in doubt.

A certificate proves things about a weight as it was, so it may be used only while the weight is known not to
have changed. torch counts changes in place, but not those through ``weight.data``, nor those of a buffer that
a weight was gathered into. What is not counted can be done only by somebody who holds the weight, its module
or its memory. Hence :meth:`Certified.of` gives one only if nobody but the block does, and the block drops it
whenever somebody gets to its children (:mod:`hf_sparse.modules.guarded`).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from triton_ops import Certificate, certify
from triton_ops.certificate import weight_stamp


@dataclass(frozen=True, eq=False)
class _Held:
    """The certificate of one weight as it was. Not a buffer: it must not be saved or converted."""

    certificate: Certificate
    stamp: tuple[int, int]
    """:func:`triton_ops.certificate.weight_stamp` of the weight; the operators check it again."""
    weight: weakref.ref[Tensor]
    """Weak, for a weight that was replaced should not be kept alive."""
    storage: StorageWeakRef
    """Makes the storage's identity in ``stamp`` last: no later storage can have the same."""


class Certified:
    """Whether a block decodes with a certificate, and the one that it holds."""

    def __init__(self) -> None:
        self.wanted = False
        self._held: _Held | None = None

    def drop(self) -> None:
        """Forget the certificate; the next call that has a use for one makes it anew."""
        self._held = None

    @property
    def is_held(self) -> bool:
        """Whether there is one to drop."""
        return self._held is not None

    def of(self, weight: Tensor) -> tuple[Certificate, tuple[int, int]] | None:
        """The certificate of ``weight [F, D]``, which nobody else holds, and its stamp.

        None where no change of it could be noticed, and on the meta device. A graph that is compiled can
        neither make a certificate nor ask a weight for its version; there the operator does.
        """
        if not torch.compiler.is_compiling() and not self._holds_for(weight):
            self._held = _make(weight)
        held = self._held
        return None if held is None else (held.certificate, held.stamp)

    def _holds_for(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the very one, unchanged as far as is counted, in the same dtype and place."""
        held = self._held
        return (
            held is not None
            and held.weight() is weight
            and not weight.is_inference()
            and held.stamp == weight_stamp(weight)
        )


def _make(weight: Tensor) -> _Held | None:
    if weight.is_inference() or weight.is_meta:
        return None
    with torch.inference_mode(False):  # a certificate made in inference mode could be used only there
        storage = StorageWeakRef(weight.untyped_storage())
        return _Held(certify(weight), weight_stamp(weight), weakref.ref(weight), storage)
