"""Arguments for every row of the table of activations, so that what is tested of all names none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import triton_ops
from support.kernel_blocks import Block, typical_threshold
from triton_ops import reference
from triton_ops.activations import TABLE

FIELDS: dict[str, dict[str, float]] = {
    name: {row.parameter.name: 0.1} if row.parameter else {} for name, row in TABLE.items()
}
"""Fields of a config, for a model's pre-activations."""

GATED_OR_PLAIN = [(name, gated) for name, row in TABLE.items() for gated in (True, False)[: 2 - row.relu_up]]
"""Every activation with every kind of MLP that may have it."""

PARAMETRISED = [pair for pair in GATED_OR_PLAIN if TABLE[pair[0]].parameter]

OWN = {"cats_silu": "silu", "cats_gelu": "gelu", "cats_gelu_tanh": "gelu_pytorch_tanh"}
"""What transformers calls the activation that a model must have of its own to take one of these."""


def own_field(name: str) -> dict[str, str]:
    """Fields of the config of a Llama, or of another model with ``hidden_act``, that takes the activation."""
    return {"hidden_act": OWN[name]} if name in OWN else {}


def fits(name: str, activation: nn.Module) -> bool:
    """Whether a block that has ``activation`` takes the one called ``name``, as far as that goes by it."""
    p = torch.linspace(-6, 6, 25)
    return name not in OWN or torch.allclose(activation(p), ACT2FN[OWN[name]](p), atol=1e-5)


CUTTING = [name for name, row in TABLE.items() if name == "fatrelu" or name.startswith("cats_")]
"""Those that jump from 0 to what they keep. Where rounding moves a value past the threshold, either side of
the jump is right."""

# Tokens, and the share of neurons that may be active: one for each way through the kernels.
ON_CPU = ((1, 1.0), (5, 1.0), (12, 1.0), (40, 1.0), (40, 0.05))
ON_GPU = ((1, 1.0), (3, 1.0))


def points(name: str, dtype: torch.dtype) -> Tensor:
    """Pre-activations ``[n]``: a grid with zeros, the parameter and its neighbours; no subnormal numbers."""
    t = torch.tensor([typical_threshold(name)], dtype=dtype)
    eps = torch.finfo(dtype).eps
    around = torch.cat([t, -t, t * (1 + eps), t * (1 - eps)])
    far = torch.tensor([-8.0, 4.1, 6.3, 8.0, 19.7]).to(dtype)
    return torch.cat([torch.linspace(-4, 4, 33, dtype=dtype), far, around])


def assert_same(y: Tensor, expected: Tensor, name: str) -> None:
    """The same bits; of an activation with an exponential in it the same zeros, and values to rounding."""
    if not name.startswith("cats_"):
        assert torch.equal(y, expected)
        return
    seen = torch.maximum(y.abs(), expected.abs()) > 1e-6  # torch's GELU is soon 0 on the left, wrongly
    assert torch.equal((y == 0)[seen], (expected == 0)[seen])
    rounding = 4e-6 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    torch.testing.assert_close(y, expected, rtol=rounding, atol=1e-6)


def assert_bits_of_the_reference(
    name: str,
    gated: bool,
    dtype: torch.dtype,
    *,
    regimes: Sequence[tuple[int, float]],
    each: bool = False,
    device: str = "cpu",
) -> None:
    """The forced backend gives the bits of the dense formula where no sum can round: with unit matrices.

    Those of CATS as :func:`assert_same` says. ``each``: every neuron has a parameter of its own.
    """
    p = points(name, dtype)
    eye = torch.eye(len(p), dtype=dtype, device=device)
    for tokens, share in regimes:
        x = torch.stack([p.roll(7 * i) for i in range(tokens)])
        x = torch.where(torch.rand(x.shape) < share, x, -x.abs()).to(device)
        up, down = -eye, triton_ops.neuron_major_(eye.clone())
        gate, up = (eye, up) if gated else (None, eye)
        threshold = p.roll(3).abs().clamp(max=2).to(device) if each else typical_threshold(name)
        block = Block(x, gate, up, down, None, None, None, name, threshold)
        assert_same(block.run(triton_ops), block.run(reference), name)
