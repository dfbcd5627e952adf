from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from triton_ops import is_neuron_major, neuron_major_
from triton_ops.layout import stock_layout_


def test_values_shape_and_identity_stay_and_strides_change():
    linear = nn.Linear(172, 64)
    weight, before = linear.weight, linear.weight.detach().clone()
    assert neuron_major_(linear.weight) is weight
    assert linear.weight.stride() == (1, 64)
    assert is_neuron_major(linear.weight)
    assert isinstance(linear.weight, nn.Parameter)
    assert linear.weight.requires_grad
    assert torch.equal(linear.weight, before)


def test_second_call_moves_nothing():
    weight = neuron_major_(torch.randn(8, 12))
    address = weight.data_ptr()
    assert neuron_major_(weight).data_ptr() == address


def test_of_two_threads_one_moves_the_weight():
    for _ in range(20):
        weight, addresses, start = torch.randn(256, 1024), [], threading.Barrier(2)

        def convert(weight=weight, addresses=addresses, start=start):
            start.wait()
            addresses.append(neuron_major_(weight).data_ptr())

        threads = [threading.Thread(target=convert) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert addresses == [weight.data_ptr()] * 2


def test_works_on_inference_tensors_and_inside_inference_mode():
    with torch.inference_mode():
        made_inside = torch.randn(8, 12)
        assert is_neuron_major(neuron_major_(made_inside))
        outside = nn.Linear(12, 8)
        assert is_neuron_major(neuron_major_(outside.weight))


def test_layout_survives_deepcopy_and_dtype():
    linear = nn.Linear(12, 8)
    neuron_major_(linear.weight)
    assert is_neuron_major(copy.deepcopy(linear).weight)
    assert is_neuron_major(linear.to(torch.bfloat16).weight)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_single_rows_and_columns(shape):
    weight = torch.randn(shape)
    before = weight.clone()
    assert is_neuron_major(neuron_major_(weight))
    assert torch.equal(weight, before)


def test_stacked_experts_are_stored_neuron_by_neuron():
    weight = torch.randn(3, 5, 7)
    before = weight.clone()
    assert not is_neuron_major(weight)
    assert is_neuron_major(neuron_major_(weight))
    assert all(is_neuron_major(one) for one in weight)
    assert torch.equal(weight, before)
    assert stock_layout_(weight).is_contiguous()
    assert torch.equal(weight, before)


def test_other_numbers_of_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3, 4, 5\)"):
        neuron_major_(torch.randn(2, 3, 4, 5))


TWO_THREADS = """
import threading, time
import torch
from triton_ops import is_neuron_major, neuron_major_
from triton_ops.layout import stock_layout_

weight = torch.nn.Parameter(torch.randn(64, 64))
stop = threading.Event()

def ask():
    while not stop.is_set():
        is_neuron_major(weight)

thread = threading.Thread(target=ask)
thread.start()
end = time.monotonic() + 4
while time.monotonic() < end:
    neuron_major_(weight)
    stock_layout_(weight)
stop.set()
thread.join()
"""


@pytest.mark.slow
def test_asking_for_the_layout_in_another_thread_never_stops_both():
    """A view made with gradient would: each thread then waits for what the other one holds."""
    subprocess.run([sys.executable, "-c", TWO_THREADS], check=True, timeout=120)
