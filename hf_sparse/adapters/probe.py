"""Does a module compute what its structure suggests? Ask it, on a tiny copy.

Names and shapes do not tell a gate from an up projection, nor show a clamp or a norm between them. So the
forward of the module's class runs once on a stand-in whose linear layers are 3 x 5 matrices and whose
activation is a marker, and the result is compared with the formula. What passes may be replaced; what does
not is left alone. Takes well under a millisecond and touches no weight of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_sparse.adapters.roles import LayerRoles

_HIDDEN, _INTERMEDIATE = 3, 5


class _TinyLinear:
    """A float64 linear layer outside of nn.Module, so that no init context (meta, ZeRO-3) can touch it."""

    def __init__(self, fan_in: int, fan_out: int, seed: int) -> None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.weight = noise(fan_out, fan_in, generator=generator)
        self.bias = noise(fan_out, generator=generator)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


def noise(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal values in float64; under ``zero.Init`` torch makes another dtype of what it is asked for."""
    return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator).double()


def marker(p: Tensor) -> Tensor:
    """A function that no model has for its activation."""
    # Nonlinear and neither odd nor even: no other placement of it gives the same output.
    return p * torch.sigmoid(1.7 * p) + 0.3 * p.cos()


def inputs(tokens: int) -> Tensor:
    """``[tokens, D]``; the last two are large and opposite, so that every limit shows."""
    x = torch.linspace(-2, 2, tokens * _HIDDEN, dtype=torch.float64, device="cpu").reshape(tokens, _HIDDEN)
    x[-1] *= 1e6
    x[-2] = -x[-1]
    return x


def computes(module: nn.Module, roles: LayerRoles) -> bool:
    """Whether ``type(module).forward`` in eval mode is the formula of ``roles`` (see :class:`LayerRoles`)."""
    sizes = roles.linears(_HIDDEN, _INTERMEDIATE)
    act = marker if roles.written is None else ACT2FN[roles.written]
    parts: dict[str, Callable[[Tensor], Tensor]] = {roles.act: act}
    parts.update((name, _TinyLinear(*size, seed)) for seed, (name, size) in enumerate(sizes.items()))
    # No instance of the class: a forward that needs more of it than the children and attributes that a
    # sparse block takes over (other methods, super()) must not pass.
    stand_in: nn.Module = object.__new__(nn.Sequential if type(module) is nn.Sequential else nn.Module)
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__["training"] = False
    stand_in.__dict__["_modules"] = {
        name: parts.get(name, nn.Identity() if isinstance(child, nn.Dropout) else child)
        for name, child in module._modules.items()
    }
    x = inputs(4).unsqueeze(0)
    wanted = parts[roles.down](roles.hidden(parts.__getitem__, x))
    try:
        with torch.no_grad():
            out = type(module).forward(stand_in, x)
    except Exception:  # a forward with other arguments or inner sizes: simply not this formula
        return False
    return isinstance(out, Tensor) and out.shape == x.shape and torch.allclose(out, wanted, rtol=1e-9)
