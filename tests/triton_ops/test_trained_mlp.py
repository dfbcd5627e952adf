"""MLPs that skip while they are trained: outputs and gradients against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import triton_ops
from support.activations import GATED_OR_PLAIN
from support.compiler import needs_compiler
from support.kernel_blocks import Block, make_block
from support.pairs import pairs
from support.passes import arguments, assert_as_exact, dense, in_float64, passes, skipping

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, hidden, neurons: ones, tails of every vector width, more of each than the kernels take at once.
SHAPES = [(1, 1, 1), (3, 17, 5), (37, 65, 700), (130, 300, 64), (40, 140, 2300), (2300, 33, 70)]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "shape", "kind", "bias"),
    pairs(DTYPES, SHAPES, GATED_OR_PLAIN, [False, True]),
    ids=lambda value: str(value).replace(" ", ""),
)
def test_any_shape(dtype, shape, kind, bias):
    activation, gated = kind
    assert_as_exact(make_block(*shape, dtype, activation, gated=gated, bias=bias))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_any_shape_few_active(dtype, gated):
    """As it is meant: 2 % of the pairs, of rows none in many."""
    block = make_block(1100, 150, 2100, dtype, "shifted_relu", gated=gated, bias=True)
    block.threshold = 2.7
    assert_as_exact(block)


@needs_compiler
def test_any_shape_threshold_of_each_neuron():
    block = make_block(50, 40, 120, torch.float32, "fatrelu", bias=True)
    block.threshold = torch.rand(120)
    assert_as_exact(block)


@needs_compiler
def test_any_shape_of_input():
    block = make_block(24, 40, 96, torch.float32, bias=True)
    flat = passes(block, skipping)
    nested = passes(replace(block, x=block.x.reshape(2, 3, 4, 40)), skipping)
    assert torch.equal(nested.y.reshape(24, 40), flat.y)
    assert torch.equal(nested.grads[0].reshape(24, 40), flat.grads[0])
    one = passes(replace(block, x=block.x[3]), skipping)
    torch.testing.assert_close(one.y, flat.y[3])


@needs_compiler
def test_nothing_active():
    block = replace(make_block(9, 16, 32, torch.float32, "shifted_relu", bias=True), threshold=1e9)
    own = passes(block, skipping)
    assert torch.equal(own.y, block.down_bias.expand(9, 16))
    *others, of_down_bias = own.grads
    assert all(not grad.any() for grad in others)
    assert of_down_bias.any()


@needs_compiler
def test_no_tokens():
    own = passes(make_block(0, 16, 32, torch.float32, bias=True), skipping)
    assert own.y.shape == (0, 16)
    assert all(not grad.any() for grad in own.grads)


@needs_compiler
def test_nan_comes_through():
    block = make_block(5, 16, 32, torch.float32)
    block.x[2, 3] = float("nan")
    own = passes(block, skipping)
    assert own.y.isnan().all(-1).tolist() == [False, False, True, False, False]
    assert own.grads[1].isnan().any()


@needs_compiler
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_what_is_frozen_gets_no_gradient(gated):
    block = make_block(20, 16, 32, torch.float32, gated=gated, bias=True)
    everything = passes(block, skipping).grads
    for kept in range(7):
        if everything[kept] is None:
            continue
        grads = passes(block, skipping, frozen=tuple(i for i in range(7) if i != kept)).grads
        assert torch.equal(grads[kept], everything[kept])
        assert all(grad is None for i, grad in enumerate(grads) if i != kept)


@needs_compiler
def test_strides_of_weights_are_any():
    block = make_block(30, 70, 90, torch.float32, bias=True)
    usual = passes(block, skipping)
    other = replace(
        block, gate=block.gate.t().contiguous().t(), up=torch.cat([block.up] * 2, 1)[:, :70], x=block.x[:, :]
    )
    assert not other.gate.is_contiguous()
    again = passes(other, skipping)
    torch.testing.assert_close(again.y, usual.y)
    for mine, theirs in zip(again.grads, usual.grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@needs_compiler
def test_bits_do_not_depend_on_threads():
    block = make_block(1100, 300, 1100, torch.float32, "shifted_relu", bias=True)
    block.threshold = 1.5
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The deciding product is torch's, whose bits may depend on it.
            block.x = block.x.round(decimals=1)
            found.append(passes(whole_numbers(block), skipping))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.y, found[0].y)
        for mine, theirs in zip(other.grads, found[0].grads, strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)


def whole_numbers(block: Block) -> Block:
    """With a deciding product that is exact in any order of its additions."""
    assert block.gate is not None
    return replace(block, x=(block.x * 4).round(), gate=(block.gate * 40).round(), gate_bias=None)


@needs_compiler
def test_less_is_kept_for_the_backward_pass():
    block = make_block(500, 64, 1000, torch.float32, "shifted_relu")
    block.threshold = 2.0

    def kept(run: Callable[..., Tensor]) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tensors = [None if t is None else t.detach().requires_grad_() for t in arguments(block)]
            y = run(*tensors, activation=block.activation, threshold=block.threshold)
        del y
        return sum(storages.values()) - sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    assert kept(skipping) < 0.1 * kept(dense)


@needs_compiler
def test_above_the_density_it_is_the_dense_formula():
    block = make_block(40, 16, 32, torch.float32, bias=True)
    share = (torch.nn.functional.linear(block.x, block.gate, block.gate_bias) > 0).float().mean().item()
    usual = passes(block, dense)
    for least, same in ((share - 0.01, True), (share + 0.01, False)):

        def limited(*tensors: Tensor | None, most: float = least, **options: object) -> Tensor:
            return triton_ops.trained_mlp(*tensors, max_density=most, **options)  # type: ignore[arg-type]

        own = passes(block, limited)
        bits = [torch.equal(a, b) for a, b in zip([own.y, *own.grads], [usual.y, *usual.grads], strict=True)]
        assert all(bits) == same


@needs_compiler
def test_autocast():
    block = make_block(40, 64, 96, torch.float32, bias=True)

    def under(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor | None, **options: object) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(*tensors, **options)

        return call

    own, usual = passes(block, under(skipping)), passes(block, under(dense))
    assert own.y.dtype == torch.bfloat16
    for mine, theirs in zip([own.y, *own.grads], [usual.y, *usual.grads], strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(dtype):
    block = make_block(30, 40, 64, torch.float32, bias=True)
    usual = passes(block, skipping)
    torch.set_default_dtype(dtype)
    try:
        own = passes(block, skipping)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(own.y, usual.y)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own.grads, usual.grads, strict=True))


@needs_compiler
def test_under_another_default_device():
    block = make_block(30, 40, 64, torch.float32, bias=True)
    usual = passes(block, skipping)

    def elsewhere(*tensors: Tensor | None, **options: object) -> Tensor:
        with torch.device("meta"):
            return skipping(*tensors, **options)

    assert torch.equal(passes(block, elsewhere).y, usual.y)


@needs_compiler
def test_what_is_lazily_negated():
    """As the imaginary part of a conjugate is, and with it gradients that come through complex numbers."""
    block = make_block(10, 16, 32, torch.float32, bias=True)
    found = []
    for run in (skipping, dense):
        tensors = [None if t is None else t.detach().requires_grad_() for t in arguments(block)]
        y = run(*tensors, activation="relu", threshold=0.0)
        z = torch.complex(torch.ones_like(y), y)
        (z.conj() * torch.arange(16)).imag.pow(2).sum().backward()
        found.append([t.grad for t in tensors])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()
    negated = torch.complex(block.x, -block.x).conj().imag
    assert negated.is_neg()
    block = replace(block, x=negated)
    run = {"activation": "relu", "threshold": 0.0}
    tensors = arguments(block)
    assert torch.equal(skipping(*tensors, **run), dense(*tensors, **run))


class Subclass(Tensor):
    """One that computes as a Tensor does."""


@needs_compiler
def test_other_kinds_of_tensors_are_dense():
    block = make_block(10, 16, 32, torch.float32, bias=True)
    run = {"activation": "relu", "threshold": 0.0}
    tensors = arguments(block)
    own = replace(block, x=block.x.as_subclass(Subclass))
    y = skipping(*arguments(own), **run)
    assert type(y) is Subclass
    assert torch.equal(y.as_subclass(Tensor), dense(*tensors, **run))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        assert skipping(*fake, **run).shape == (10, 16)
    x, *weights = tensors
    mapped = torch.func.vmap(lambda one: skipping(one, *weights, **run))(x)
    torch.testing.assert_close(mapped, dense(*tensors, **run))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("down", torch.randn(400, 64), r"down has shape \[400, 64\]"),
        ("up", torch.randn(32, 16), r"up has shape \[32, 16\]"),
        ("up", torch.randn(64, 16, device="meta"), "up is on meta"),
        ("up", torch.randn(64, 16, dtype=torch.float64), "up is torch.float64"),
        ("up_bias", torch.randn(1), r"up_bias has shape \[1\]"),
        ("threshold", torch.tensor(0.1), r"threshold has shape \[\]"),
        ("threshold", torch.zeros(64, requires_grad=True), "threshold requires grad"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    block = replace(make_block(40, 16, 64, torch.float32, "fatrelu", bias=True), **{name: value})
    with pytest.raises(ValueError, match=message):
        skipping(*arguments(block), activation="fatrelu", threshold=block.threshold)


@needs_compiler
def test_inputs_of_no_features():
    block = make_block(5, 1, 8, torch.float32, bias=True)
    none = {name: getattr(block, name)[:, :0] for name in ("x", "gate", "up")}
    block = replace(block, **none, down=block.down[:0], down_bias=block.down_bias[:0])
    own, usual = passes(block, skipping), passes(block, dense)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(own.grads, usual.grads, strict=True))


@needs_compiler
def test_what_needs_no_gradient_may_change_before_the_backward_pass():
    block = make_block(10, 16, 32, torch.float32, bias=True)

    def after_a_change(kept: int, changed: int) -> tuple[Tensor, Tensor]:
        tensors = [t.clone().requires_grad_(i == kept) for i, t in enumerate(arguments(block))]
        loss = skipping(*tensors, activation="relu", threshold=0.0).sum()
        with torch.no_grad():
            tensors[changed].mul_(2)
        return loss, tensors[kept]

    for kept in (2, 3):
        loss, leaf = after_a_change(kept, changed=1)
        loss.backward()
        assert leaf.grad is not None
    loss, _ = after_a_change(1, changed=3)  # the gradient of the first projection is made with it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_second_derivatives_are_refused():
    block = make_block(10, 16, 32, torch.float32)
    tensors = [None if t is None else t.requires_grad_() for t in arguments(block)]
    y = skipping(*tensors, activation="relu", threshold=0.0)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), tensors[0], create_graph=True)


@needs_compiler
def test_other_backends_and_dtypes_are_dense():
    block = make_block(10, 16, 32, torch.float32)
    usual = passes(block, dense)
    with triton_ops.backend("dense"):
        assert torch.equal(passes(block, skipping).y, usual.y)
    assert torch.equal(passes(in_float64(block), skipping).y, passes(in_float64(block), dense).y)


def test_what_is_not_possible_is_refused():
    block = make_block(3, 4, 5, torch.float32, gated=False)
    with pytest.raises(ValueError, match="needs a gate"):
        skipping(*arguments(block), activation="drelu")
    with pytest.raises(ValueError, match=r"max_density=1\.5"):
        triton_ops.trained_mlp(block.x, block.up, None, block.down, activation="relu", max_density=1.5)
