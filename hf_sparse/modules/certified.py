"""A certificate together with what tells whether it is still that of a block's weight."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from triton_ops import Certificate, certify
from triton_ops.certificate import weight_stamp


@dataclass(frozen=True, eq=False)
class HeldCertificate:
    """The certificate of one weight as it was.

    Not a buffer: it belongs to the values of a weight on one device, and must not be saved or converted.
    """

    certificate: Certificate
    stamp: tuple[int, int]
    """:func:`triton_ops.certificate.weight_stamp` of the weight; the operators check it again."""
    weight: weakref.ref[Tensor]
    """Weak, for a weight that was replaced should not be kept alive."""
    storage: StorageWeakRef
    """Makes the storage's identity in ``stamp`` last: no later storage can have the same."""

    @staticmethod
    def make(weight: Tensor) -> HeldCertificate | None:
        """Certify ``weight [F, D]``; None where no change of it could be noticed, and on the meta device."""
        if weight.is_inference() or weight.is_meta:
            return None
        with torch.inference_mode(False):  # a certificate made in inference mode could be used only there
            storage = StorageWeakRef(weight.untyped_storage())
            return HeldCertificate(certify(weight), weight_stamp(weight), weakref.ref(weight), storage)

    def holds_for(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the very one, unchanged, in the same dtype and place."""
        return self.weight() is weight and not weight.is_inference() and self.stamp == weight_stamp(weight)
