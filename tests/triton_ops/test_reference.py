from __future__ import annotations

import torch

from triton_ops import reference


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
