"""The backends that there are. A new one is registered here, beside no other line of code that names it."""

from __future__ import annotations

from triton_ops import stock_torch
from triton_ops.cpu import backend as cpu
from triton_ops.gpu import backend as gpu
from triton_ops.protocol import Backend

AUTO = "auto"
"""No backend: the choice is the package's."""
DENSE = "dense"
"""No backend: nothing is skipped; the plain formula of :mod:`triton_ops.reference`."""

REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (cpu.BACKEND, stock_torch.BACKEND, gpu.BACKEND)
}
"""By name; of those for one device, the best first."""

BACKENDS = (AUTO, DENSE, *REGISTRY)
"""What may be asked for."""


def automatic(device: str) -> list[Backend]:
    """Those that may be chosen without being asked for on this type of device, the best first."""
    return [backend for backend in REGISTRY.values() if device in backend.devices]
