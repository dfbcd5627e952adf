from __future__ import annotations

import math

import pytest
import torch

from triton_ops import ACTIVATIONS, reference

# kind, threshold, p, expected
VALUES = [
    ("relu", 0.0, -1.0, 0.0),
    ("relu", 0.0, 2.0, 2.0),
    ("relu2", 0.0, -3.0, 0.0),
    ("relu2", 0.0, 3.0, 9.0),
    ("jsrelu", 0.0, -1.0, 0.0),
    ("jsrelu", 0.0, 2.0, 4.0),
    ("shifted_relu", 0.5, 0.5, 0.0),
    ("shifted_relu", 0.5, 2.0, 1.5),
    ("shifted_relu", -1.0, -0.25, 0.75),
    ("fatrelu", 0.5, 0.25, 0.0),
    ("fatrelu", 0.5, 0.5, 0.5),
    ("fatrelu", 0.5, 2.0, 2.0),
    ("drelu", 0.0, -1.0, 0.0),
    ("drelu", 0.0, 2.0, 2.0),
]


@pytest.mark.parametrize(("kind", "threshold", "p", "expected"), VALUES)
def test_activation_has_its_published_value(kind, threshold, p, expected):
    assert reference.activation(torch.tensor([p]), kind, threshold).item() == expected


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_is_not_silent(kind):
    assert math.isnan(reference.activation(torch.tensor([math.nan]), kind, 0.0).item())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_derivative_is_the_slope_of_the_activation(kind):
    threshold = 0.5 if kind in reference.THRESHOLDED else 0.0
    # The kinks themselves are among the points.
    p = torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5, 0.75, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(reference.activation(p, kind, threshold).sum(), p)
    torch.testing.assert_close(reference.activation_derivative(p.detach(), kind, threshold), slope)


def test_gated_mlp_multiplies_gate_and_up_of_each_neuron():
    x = torch.tensor([[1.0, 2.0]])
    gate, up = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    down = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    # Neuron 0: gate 1, up 6. Neuron 1: gate -2, silent.
    y = reference.gated_mlp(x, gate, up, down, activation="relu")
    assert y.tolist() == [[6.0, 12.0]]


def test_drelu_is_silent_where_up_is_negative():
    x = torch.tensor([[1.0]])
    ones = torch.ones(1, 1)
    assert reference.gated_mlp(x, ones, -ones, ones, activation="drelu").item() == 0.0
    assert reference.gated_mlp(x, ones, -ones, ones, activation="relu").item() == -1.0


@pytest.mark.parametrize(
    ("kind", "threshold", "message"),
    [
        ("silu", 0.0, "activation='silu' is not known; choose one of relu,"),
        ("relu", 0.5, "threshold=0.5 has no meaning for activation='relu'"),
        ("fatrelu", -0.5, "threshold=-0.5 is not valid for fatrelu"),
        ("fatrelu", math.nan, "threshold=nan is not valid for fatrelu"),
    ],
)
def test_errors_name_the_field_and_the_value(kind, threshold, message):
    with pytest.raises(ValueError, match=message):
        reference.check_activation(kind, threshold)
