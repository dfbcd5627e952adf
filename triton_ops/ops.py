"""The operators as ``torch.library`` custom operators: schema, fake, autograd, and the call of a backend.

``torch.ops.hf_sparse.gated_mlp``, ``plain_mlp`` and ``sparse_linear``; the functions here give them keyword
arguments and defaults. Gradients are those of the dense formula, recomputed from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from triton_ops import choice, reference
from triton_ops.activations import TABLE, check
from triton_ops.advice import adviser
from triton_ops.backends import AUTO, DENSE
from triton_ops.certificate import Certificate, weight_stamp
from triton_ops.gradients import (
    gated_mlp_backward,
    linear_backward,
    plain_mlp_backward,
    save_gated_mlp,
    save_linear,
    save_plain_mlp,
)
from triton_ops.layout import is_neuron_major, view_of
from triton_ops.mlp import MLP
from triton_ops.problem import Form
from triton_ops.unobserved import unobserved

LIB = torch.library.Library("hf_sparse", "DEF")
# Strides carry the neuron-major layout, so a compiler must hand the operators the strides it was given.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(name: str, signature: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define the operator ``name``, and its overload ``inference``, which has no gradient.

    To find out that there is none to be had takes torch longer than all else that it does for a call. A third
    overload, ``native``, is for graphs on the CPU: a backend may have it computed without Python.
    """
    for one in (name, f"{name}.inference", f"{name}.native"):
        LIB.define(f"{one}({signature}) -> Tensor", tags=TAGS)
        torch.library.register_fake(f"hf_sparse::{one}", fake, lib=LIB)
    for one in (name, f"{name}.inference"):
        for device in ("CPU", "CUDA"):
            LIB.impl(one, function, device)


def dispatched(packet: Any, x: Tensor, backend: str) -> Any:
    """The overload to call for ``x`` and this backend."""
    if not in_inference_graph():
        return packet.default
    native = x.device.type == "cpu" and choice.is_native_in_graph(backend)
    return packet.native if native else packet.inference


def native_or_default(packet: Any, function: str, dtype: torch.dtype) -> Any:
    """The overload to call in a graph without gradient on the CPU, of what a backend has ``function`` for."""
    backend = choice.cpu_backend_in_graph(function, dtype)
    return packet.native if choice.is_native_in_graph(backend) else packet.default


def in_inference_graph() -> bool:
    """Whether ``torch.compile`` makes a graph without gradient, which is not for export."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and not torch.is_grad_enabled()


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
    certificate: Certificate | None = None,
    stamp: tuple[int, int] | None = None,
    backend: str = AUTO,
) -> Tensor:
    """The gated MLP ``down(act(gate(x)) * up(x))``, without touching what silent neurons own.

    Args:
        x: ``[..., D]``, bfloat16, float16, float32 or float64, of any strides.
        gate: ``[F, D]``, same dtype and device as ``x``.
        up: ``[F, D]``.
        down: ``[D, F]``; skipping needs the strides of :func:`neuron_major_`, without them it runs dense.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        activation: a name in :data:`triton_ops.activations.TABLE`.
        threshold: its parameter, in the units of the table; 0 if it has none. A number, or one for each
            neuron: ``[F]``, dtype and device of ``x``, whose values are not checked and get no gradient.
        certificate: of ``gate`` as it is now (:func:`certify`). Backends that can use it then read only the
            gate rows of neurons that may be active. The result is the same, bit for bit. Ignored for an
            activation that is not ``certifiable``.
        stamp: :func:`triton_ops.certificate.weight_stamp` of ``gate`` when it was certified. If it is another
            one when the operator runs, also in a compiled graph, the certificate is out of date and ignored.
            The replay of a captured CUDA graph runs no operator: capture again after changing the weight.
        backend: what :meth:`triton_ops.Plan.backend` has answered, and is done. ``"auto"`` asks when the
            operator runs: for :func:`triton_ops.backend` and, since the density is not known, whether
            skipping is no slower at any density.

    Returns:
        ``[..., D]``, the dtype of ``x``, contiguous.

    Raises:
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        RuntimeError: the backend cannot run here.
        MemoryError: the compiled backend has no memory for its intermediate values.

    """
    if is_for_torch(x.device.type):
        check(activation, threshold, gated=True)
        return reference.gated_mlp(
            x, gate, up, down, gate_bias, up_bias, down_bias, activation=activation, threshold=threshold
        )
    scalar, each = check_threshold(threshold)
    tensors = x, gate, up, down, gate_bias, up_bias, down_bias, *(certificate or (None, None)), each
    call = _gated_mlp if unobserved(*tensors) else dispatched(torch.ops.hf_sparse.gated_mlp, x, backend)
    return call(*tensors, stamp, activation, scalar, backend)


def plain_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
    certificate: Certificate | None = None,
    stamp: tuple[int, int] | None = None,
    backend: str = AUTO,
) -> Tensor:
    """The plain MLP ``down(act(up(x)))``, without touching the down weights of silent neurons.

    Arguments, result and errors are those of :func:`gated_mlp` without a gate: ``up [F, D]`` decides which
    neurons are active, ``certificate`` is that of ``up``, and ``"drelu"`` is not possible.
    """
    if is_for_torch(x.device.type):
        check(activation, threshold, gated=False)
        return reference.plain_mlp(
            x, up, down, up_bias, down_bias, activation=activation, threshold=threshold
        )
    scalar, each = check_threshold(threshold)
    tensors = x, up, down, up_bias, down_bias, *(certificate or (None, None)), each
    call = _plain_mlp if unobserved(*tensors) else dispatched(torch.ops.hf_sparse.plain_mlp, x, backend)
    return call(*tensors, stamp, activation, scalar, backend)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """``h weightᵀ + bias``, reading only the weights of neurons where ``h`` is not exactly zero.

    Args:
        h: ``[..., F]``, the activations, with exact zeros where a neuron is silent.
        weight: ``[D, F]``; skipping needs the strides of :func:`neuron_major_`, without them it runs dense.
        bias: ``[D]`` or None.
        backend: as of :func:`gated_mlp`.

    Returns:
        ``[..., D]``, the dtype of ``h``, contiguous.

    Raises:
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        RuntimeError: the backend cannot run here.
        MemoryError: the compiled backend has no memory for its intermediate values.

    """
    if is_for_torch(h.device.type):
        return reference.sparse_linear(h, weight, bias)
    packet = torch.ops.hf_sparse.sparse_linear
    call = _sparse_linear if unobserved(h, weight, bias) else dispatched(packet, h, backend)
    return call(h, weight, bias, backend)


def is_for_torch(device: str) -> bool:
    """Whether calls on this type of device are wanted in torch's own operators.

    Autocast casts their inputs; forward-mode derivatives have no formula here.
    """
    return choice.autocasts(device) or forward_ad._current_level >= 0


def check_threshold(threshold: float | Tensor) -> tuple[float, Tensor | None]:
    """As the operators take it; one that is to get a gradient is refused."""
    if not isinstance(threshold, Tensor):
        return threshold, None
    if threshold.requires_grad and torch.is_grad_enabled():
        raise ValueError("threshold requires grad, and the operators give it none; pass threshold.detach().")
    return 0.0, threshold


def check_tensor(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a tensor of another ``shape``, called ``what``, or another dtype or device than ``like``."""
    if value is None:
        return
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {what} = {list(shape)}.")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype}; expected {dtype}, as triton_ops.certify makes it.")
    if dtype is None and value.dtype != like.dtype:
        raise ValueError(f"{name} is {value.dtype} and the input is {like.dtype}; convert one to the other.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} and the input is on {like.device}; move one of them.")


def check_mlp(x: Tensor, mlp: MLP) -> None:
    """Refuse what does not fit together, as :func:`gated_mlp` says."""
    gated = mlp.up is not None
    first = "gate" if gated else "up"
    check(mlp.activation, mlp.threshold, gated=gated)
    check_input("x", x, mlp.first, first)
    neurons, hidden = mlp.first.shape
    check_tensor(first, mlp.first, (neurons, x.shape[-1]), x, "[F, D]")
    check_tensor("up", mlp.up, (neurons, hidden), x, "[F, D]")
    check_tensor("down", mlp.down, (hidden, neurons), x, "[D, F]")
    check_vectors(x, mlp, first)
    if mlp.certificate is not None:
        check_certificate(mlp.certificate, (neurons, hidden), x, "F")


def check_certificate(certificate: Certificate, shape: tuple[int, ...], like: Tensor, row: str) -> None:
    """Refuse one that is not of a weight of this ``shape``, ``[row, …]``, on the device of ``like``."""
    rows, bounds = certificate
    check_tensor("certificate.rows", rows, shape, like, f"[{row}, inputs]", torch.int8)
    check_tensor("certificate.bounds", bounds, (shape[0], 3), like, f"[{row}, 3]", torch.float32)


def check_vectors(x: Tensor, mlp: MLP, first: str) -> None:
    """Refuse biases and thresholds that do not fit the weights; ``first`` is the name of the deciding one."""
    neurons, hidden = mlp.first.shape
    check_tensor(f"{first}_bias", mlp.first_bias, (neurons,), x, "[F]")
    check_tensor("up_bias", mlp.up_bias, (neurons,), x, "[F]")
    check_tensor("down_bias", mlp.down_bias, (hidden,), x, "[D]")
    if isinstance(mlp.threshold, Tensor):
        check_tensor("threshold", mlp.threshold, (neurons,), x, "[F]")


def _check_sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_input("h", h, weight, "weight")
    hidden, _ = weight.shape
    check_tensor("weight", weight, (hidden, h.shape[-1]), h, "[D, F]")
    check_tensor("bias", bias, (hidden,), h, "[D]")


def check_input(name: str, x: Tensor, weight: Tensor, weight_name: str) -> None:
    """Refuse an input without features or not of floating numbers, and a weight that is no matrix."""
    if x.ndim < 1:
        raise ValueError(f"{name} has no dimension; expected [..., features].")
    if weight.ndim != 2:
        raise ValueError(f"{weight_name} has shape {list(weight.shape)}; expected two dimensions.")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; expected a floating dtype.")


def run(x: Tensor, mlp: MLP, backend: str, stamp: list[int] | None = None) -> Tensor:
    """One MLP by a backend, as :func:`gated_mlp` says."""
    check_mlp(x, mlp)
    if mlp.certificate is not None and not _valid(mlp, stamp):
        mlp = mlp._replace(certificate=None)
    neurons, hidden = mlp.first.shape
    tokens = x.numel() // hidden if hidden else 0
    if tokens == 1 and mlp.certificate is None and (one := adviser()) is not None and _certifiable(mlp):
        mlp = mlp._replace(certificate=one.certificate(mlp.first))
    product = DENSE
    if backend == AUTO:
        backend, product = _choose(tokens, mlp)
    chosen = None if backend == DENSE else choice.runnable(backend, x.device.type, x.dtype)
    if chosen is None or not is_neuron_major(mlp.down) or not (tokens and neurons):
        return _dense(x, mlp, product)
    return chosen.mlp(x, mlp)


def _certifiable(mlp: MLP) -> bool:
    """Whether the activation is one that a certificate can speak of."""
    return TABLE[mlp.activation].certifiable


def _valid(mlp: MLP, stamp: list[int] | None) -> bool:
    """Whether the certificate is of the weight as it is, and of use."""
    return _certifiable(mlp) and (stamp is None or tuple(stamp) == weight_stamp(mlp.first))


def _choose(tokens: int, mlp: MLP) -> tuple[str, str]:
    """The backend of the call, and that of a dense product with the neuron-major down projection."""
    form: Form = "plain" if mlp.up is None else "gated"
    plan = choice.plan(mlp.first, form)
    backend = DENSE
    if mlp.certificate is not None:  # it may be given where it is of no use
        backend = choice.plan(mlp.first, form, certified=True).backend(tokens)
    return plan.backend(tokens) if backend == DENSE else backend, plan.product


def _dense(x: Tensor, mlp: MLP, product: str) -> Tensor:
    """The formula of the reference, in place where that saves memory traffic."""
    row = TABLE[mlp.activation]
    h = row.value(F.linear(x, mlp.first, mlp.first_bias), mlp.threshold)
    if mlp.up is not None:
        u = F.linear(x, mlp.up, mlp.up_bias)
        h *= u.relu_() if row.relu_up else u
    if product != DENSE and is_neuron_major(mlp.down):
        return _sparse_linear(h, mlp.down, mlp.down_bias, product)
    return reference.sparse_linear(h, mlp.down, mlp.down_bias)


# Strides and memory are read one after the other, and the interpreter may change threads meanwhile. A graph,
# unlike a module, has no view of a weight whose layout may change, but the parameter.
def _gated_mlp(x: Tensor, *args: Any) -> Tensor:
    mlp = _gated(*args)
    return run(x, mlp._replace(down=view_of(mlp.down)), args[-1], args[9])


def _plain_mlp(x: Tensor, *args: Any) -> Tensor:
    mlp = _plain(*args)
    return run(x, mlp._replace(down=view_of(mlp.down)), args[-1], args[7])


def _gated(
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    q: Tensor | None,
    bounds: Tensor | None,
    thresholds: Tensor | None,
    stamp: list[int] | None,
    activation: str,
    threshold: float,
    backend: str,
) -> MLP:
    """The operator's arguments after x."""
    certificate = None if q is None or bounds is None else Certificate(q, bounds)
    own = threshold if thresholds is None else thresholds
    return MLP(gate, up, down, gate_bias, up_bias, down_bias, activation, own, certificate)


def _plain(
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    q: Tensor | None,
    bounds: Tensor | None,
    thresholds: Tensor | None,
    stamp: list[int] | None,
    activation: str,
    threshold: float,
    backend: str,
) -> MLP:
    certificate = None if q is None or bounds is None else Certificate(q, bounds)
    own = threshold if thresholds is None else thresholds
    return MLP(up, None, down, up_bias, None, down_bias, activation, own, certificate)


def _sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check_sparse_linear(h, weight, bias)
    weight = view_of(weight)
    hidden, neurons = weight.shape
    tokens = h.numel() // neurons if neurons else 0
    if backend == AUTO:
        plan = choice.plan(weight, "linear")
        backend = plan.backend(tokens)
        if backend == DENSE:
            backend = plan.product
    chosen = None if backend == DENSE else choice.runnable(backend, h.device.type, h.dtype)
    if chosen is None or not is_neuron_major(weight) or not (tokens and hidden):
        return reference.sparse_linear(h, weight, bias)
    return chosen.sparse_linear(h, weight, bias)


def _fake_gated_mlp(x: Tensor, *args: Any) -> Tensor:
    check_mlp(x, _gated(*args))
    return x.new_empty(x.shape)


def _fake_plain_mlp(x: Tensor, *args: Any) -> Tensor:
    check_mlp(x, _plain(*args))
    return x.new_empty(x.shape)


def _fake_sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check_sparse_linear(h, weight, bias)
    return h.new_empty((*h.shape[:-1], weight.shape[0]))


define(
    "gated_mlp",
    "Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "Tensor? q, Tensor? bounds, Tensor? thresholds, int[]? stamp, str activation, float threshold, "
    "str backend",
    _gated_mlp,
    _fake_gated_mlp,
)
define(
    "plain_mlp",
    "Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor? q, Tensor? bounds, "
    "Tensor? thresholds, int[]? stamp, str activation, float threshold, str backend",
    _plain_mlp,
    _fake_plain_mlp,
)
define(
    "sparse_linear",
    "Tensor h, Tensor weight, Tensor? bias, str backend",
    _sparse_linear,
    _fake_sparse_linear,
)


torch.library.register_autograd(
    "hf_sparse::gated_mlp", gated_mlp_backward, setup_context=save_gated_mlp, lib=LIB
)
torch.library.register_autograd(
    "hf_sparse::plain_mlp", plain_mlp_backward, setup_context=save_plain_mlp, lib=LIB
)
torch.library.register_autograd(
    "hf_sparse::sparse_linear", linear_backward, setup_context=save_linear, lib=LIB
)
