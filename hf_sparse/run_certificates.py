"""Certificates that are made anew by each ``generate()``.

While it runs nobody asks who holds a weight: what torch counts as a change, and another place in memory, is
noticed at each use; what is done through ``weight.data`` between two calls of ``generate()`` counts as well.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

import triton_ops
from triton_ops import Certificate
from triton_ops.certificate import weight_stamp


class Memory:
    """That of certificates of former runs, for those to come. Copies and pickles have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Certificate] = []

    def take(self, weight: Tensor) -> Certificate | None:
        """What fits ``weight``; it is the caller's from here on."""
        with self._lock:
            for i, one in enumerate(self._free):
                if one.rows.shape == weight.shape and one.rows.device == weight.device:
                    return self._free.pop(i)
        return None

    def give(self, certificates: list[Certificate]) -> None:
        """Take back what is of no more use; instead of what nobody has taken."""
        with self._lock:
            self._free = certificates or self._free

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


class RunCertificates:
    """The certificates of one run."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held: dict[int, tuple[Any, torch.UntypedStorage, Certificate]] = {}
        """By address. The storage is held, for its identity is a part of the stamp."""

    def of(self, weight: Tensor) -> Certificate:
        """That of ``weight [D, F]`` on the CPU as it is; no inference tensor, which counts no changes."""
        address = weight.data_ptr()
        state = weight_stamp(weight), weight.dtype, weight.shape, weight.stride()
        before, _, certificate = self._held.get(address, (None, None, None))
        if certificate is None or before != state:
            fits = certificate is not None and certificate.rows.shape == weight.shape
            certificate = triton_ops.certify(weight, certificate if fits else self._memory.take(weight))
            self._held[address] = state, weight.untyped_storage(), certificate
        return certificate

    def end(self) -> None:
        """Give the memory to the next run."""
        self._memory.give([certificate for *_, certificate in self._held.values()])
        self._held = {}
