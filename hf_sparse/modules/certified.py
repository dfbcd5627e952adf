"""The certificate of a block's deciding projection."""

from __future__ import annotations

from hf_sparse.modules.derived import Derived
from triton_ops import Certificate, certify


class Certified(Derived[Certificate]):
    """Whether a block decodes with a certificate, and that of its weight ``[F, D]``, if it has one now.

    The operators check the stamp again, in a compiled graph too.
    """

    def __init__(self) -> None:
        super().__init__(certify)
        self.wanted = False
