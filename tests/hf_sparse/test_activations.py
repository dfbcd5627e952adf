"""The modules of the activations: what the operators' table says, and recognised as its rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_sparse import ActivationConfig
from hf_sparse.activations import MODULES, FATReLU, build_activation, relu_up, row_of
from hf_sparse.activations.config import ACTIVATIONS
from support.activations import FIELDS, points
from triton_ops.activations import TABLE


def module(name: str) -> nn.Module:
    return build_activation(ActivationConfig(name=name, **FIELDS[name]), 0, nn.SiLU())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLE)
def test_a_module_has_the_bits_of_its_row(name, dtype):
    p, parameter = points(name, dtype), sum(FIELDS[name].values())
    assert torch.equal(module(name)(p), TABLE[name].value(p, parameter))


@pytest.mark.parametrize("name", TABLE)
def test_a_module_has_the_slope_of_its_row(name):
    p = points(name, torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(module(name)(p).sum(), p)
    assert torch.equal(slope, TABLE[name].slope(p.detach(), sum(FIELDS[name].values())))


@pytest.mark.parametrize("name", TABLE)
def test_a_module_is_recognised_as_its_row(name):
    assert row_of(module(name), relu_up=relu_up(name)) == (name, sum(FIELDS[name].values()))


def test_every_row_has_a_module_and_a_name_in_configs():
    assert list(MODULES) == list(TABLE)
    assert ("original", *TABLE) == ACTIVATIONS


def test_what_may_compute_anything_is_not_recognised():
    class Own(FATReLU):
        def forward(self, p):
            return p

    assert row_of(Own(0.1)) is None
    assert row_of(nn.GELU()) is None
    assert row_of(FATReLU(0.1), relu_up=True) is None
