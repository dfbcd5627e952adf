"""Operators that skip silent neurons, and a dense one for decoding: numbers in, numbers out.

Nothing here knows of transformers.
"""

from triton_ops.activations import ACTIVATIONS
from triton_ops.backends import AUTO, BACKENDS, DENSE
from triton_ops.certificate import Certificate
from triton_ops.certifier import certify
from triton_ops.choice import Plan, backend, plan
from triton_ops.decode_attention import decode_attention
from triton_ops.dense_linear import linear
from triton_ops.greedy_linear import greedy_linear
from triton_ops.int8 import int8_in_graph, int8_kernels, int8_linear, int8_mlp, int8_sparse_linear
from triton_ops.layout import is_neuron_major, neuron_major_
from triton_ops.memo import forget
from triton_ops.mlp import Int8Weight
from triton_ops.ops import gated_mlp, plain_mlp, sparse_linear
from triton_ops.problem import Problem
from triton_ops.routed import routed_mlp
from triton_ops.trained_mlp import skips as skips_in_training
from triton_ops.trained_mlp import trained_mlp

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "BACKENDS",
    "DENSE",
    "Certificate",
    "Int8Weight",
    "Plan",
    "Problem",
    "backend",
    "certify",
    "decode_attention",
    "forget",
    "gated_mlp",
    "greedy_linear",
    "int8_in_graph",
    "int8_kernels",
    "int8_linear",
    "int8_mlp",
    "int8_sparse_linear",
    "is_neuron_major",
    "linear",
    "neuron_major_",
    "plain_mlp",
    "plan",
    "routed_mlp",
    "skips_in_training",
    "sparse_linear",
    "trained_mlp",
]
