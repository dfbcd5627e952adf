"""Operators that skip silent neurons: numbers in, numbers out; nothing here knows of transformers."""

from triton_ops.activations import ACTIVATIONS
from triton_ops.certificate import Certificate, certify
from triton_ops.dispatch import BACKENDS, backend, wants_product, wants_sparse
from triton_ops.layout import is_neuron_major, neuron_major_
from triton_ops.ops import gated_mlp, plain_mlp, sparse_linear

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Certificate",
    "backend",
    "certify",
    "gated_mlp",
    "is_neuron_major",
    "neuron_major_",
    "plain_mlp",
    "sparse_linear",
    "wants_product",
    "wants_sparse",
]
