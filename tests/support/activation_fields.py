"""Every activation that a model can be patched with, and fields that make it different from ReLU."""

from __future__ import annotations

ACTIVATIONS: dict[str, dict[str, float]] = {
    "relu": {},
    "relu2": {},
    "shifted_relu": {"shift": 0.1},
    "fatrelu": {"threshold": 0.05},
    "drelu": {},
    "jsrelu": {},
}
