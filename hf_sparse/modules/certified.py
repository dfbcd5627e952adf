"""The certificate of a block's deciding projection."""

from __future__ import annotations

from hf_sparse.modules.derived import Derived
from triton_ops import Certificate, certify


class Certified(Derived[Certificate]):
    """Whether a block decodes with a certificate, and the one of its weight ``[F, D]`` that it holds.

    The operators check the stamp again, in a compiled graph too.
    """

    def __init__(self) -> None:
        super().__init__(certify)
        self.wanted = False
