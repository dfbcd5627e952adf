"""Inputs left out by a weighted score, or taken for a center: what is computed, and that it stays true."""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters.pruning import Pruning, column_norms
from hf_sparse.calibration.distribution import Distribution
from hf_sparse.modules import SparseLinear
from support.models import tiny
from support.skips import CountSkips

WEIGHTED = {"threshold": (0.06, 0.05, 0.0), "weighted": True}
CENTERED = {"threshold": 0.3, "center": (0.25, -0.5, 0.125)}
BOTH = {"threshold": 0.1, "center": 0.25, "weighted": True}
INPUTS = {"self_attn.q_proj": WEIGHTED, "mlp.up_proj": CENTERED, "mlp.gate_proj": BOTH}


def config(**inputs) -> SparsityConfig:
    return SparsityConfig(activation="original", inputs=inputs or INPUTS)


def by_hand(model: nn.Module) -> nn.Module:
    """The same, with hooks on stock layers that read the weight each time."""

    def hook(threshold: float, center: float, weighted: bool):
        def replace(linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            score = (args[0] - center).abs()
            if weighted:
                score = score * linear.weight.detach().square().sum(0).sqrt()
            return (torch.where(score <= threshold, center, args[0]),)

        return replace

    for index, layer in enumerate(model.model.layers):
        for name, given_ in INPUTS.items():
            one = {"center": 0.0, "weighted": False, **given_}
            at = [v[index] if isinstance(v, tuple) else v for v in (one["threshold"], one["center"])]
            if at[0]:
                layer.get_submodule(name).register_forward_pre_hook(hook(*at, one["weighted"]))
    return model


def left_out(model: nn.Module, input_ids: Tensor) -> float:
    """The share of what the layers of INPUTS are given that they leave out."""
    shares = []
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda one, args: shares.append(
                (one.pruning.deviations(args[0], column_norms(one.weight)) == 0).float().mean()
            )
        )
        for layer in model.model.layers[:2]
        for name in INPUTS
    ]
    model(input_ids)
    for one in hooks:
        one.remove()
    return float(sum(shares) / len(shares))


def test_a_case_by_hand() -> None:
    x = torch.tensor([1.0, -0.5, 3.0, 0.1])
    weight = torch.tensor([[0.0, 3.0, 0.1, 0.0], [1.0, 4.0, 0.0, 0.0]])
    norms = column_norms(weight)  # 1, 5, 0.1, 0: scores are 1, 2.5, 0.3, 0
    torch.testing.assert_close(norms, torch.tensor([1.0, 5.0, 0.1, 0.0]))
    weighted = Pruning(1.0, weighted=True)
    assert weighted.values(x, norms).tolist() == [0, -0.5, 0, 0]
    centered = Pruning(0.75, center=0.5)  # distances are 0.5, 1, 2.5, 0.4
    assert centered.values(x).tolist() == [0.5, -0.5, 3, 0.5]
    assert centered.deviations(x).tolist() == [0, -1, 2.5, 0]
    y = weight @ centered.values(x)
    torch.testing.assert_close(weight @ centered.deviations(x) + 0.5 * weight.sum(1), y)


def test_the_model_computes_it_and_unpatch_brings_the_stock_layers_back(input_ids) -> None:
    model = tiny("llama")
    stock, modules = model(input_ids).logits, list(model.modules())
    expected = by_hand(copy.deepcopy(model))(input_ids).logits
    hf_sparse.patch(model, config())
    assert 0.1 < left_out(model, input_ids) < 0.9
    assert not torch.allclose(stock, expected)
    torch.testing.assert_close(model(input_ids).logits, expected)
    hf_sparse.unpatch(model)
    assert torch.equal(model(input_ids).logits, stock)
    assert list(model.modules()) == modules


def test_single_tokens_skip_and_give_what_dense_gives(input_ids) -> None:
    model = tiny("llama", mlp_bias=True)
    hf_sparse.patch(model, config())
    token = input_ids[:1, :1]
    with torch.no_grad():
        dense = model(token).logits
    with torch.no_grad(), hf_sparse.backend("cpp"), CountSkips() as skips:
        skipped = model(token).logits
    assert skips.count == 2 + 3 + 3
    torch.testing.assert_close(skipped, dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", [0.0, 0.25, -0.171875])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_skips_is_as_exact_as_a_dense_one(dtype, center, weighted, bias) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 200, bias=bias, dtype=dtype)
    pruning = Pruning(0.4, center, weighted)
    x = torch.randn(1, 300).to(dtype)
    norms = column_norms(linear.weight)
    with torch.no_grad():  # a graph would hold the weight
        exact = pruning.values(x, norms).double() @ linear.weight.double().t()
        exact += linear.bias.double() if bias else 0.0
    sparse = SparseLinear(linear, gives_zeros=True, pruning=pruning).eval()
    del linear
    with torch.no_grad():
        dense = sparse(x)
        with hf_sparse.backend("cpp"), CountSkips() as skips:
            skipped = sparse(x)
    assert skips.count == 1
    errors = [float((y.double() - exact).abs().max()) for y in (skipped, dense)]
    assert errors[0] <= 2 * errors[1] + 1e-6


def test_row_sums_that_are_much_larger_than_the_result_cost_no_precision() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3000, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.fill_(1.0).add_(torch.randn(64, 3000).bfloat16() * 0.02)
    pruning = Pruning(0.4, 1.5)
    x = (torch.randn(1, 3000) * 0.5 + 0.5).bfloat16()
    with torch.no_grad():
        exact = pruning.values(x).double() @ linear.weight.double().t() + linear.bias.double()
    sparse = SparseLinear(linear, gives_zeros=True, pruning=pruning).eval()
    del linear
    with torch.no_grad(), hf_sparse.backend("cpp"), CountSkips() as skips:
        skipped = sparse(x)
    assert skips.count == 1
    assert 1024 < exact.min() < exact.max() < 2048  # where bfloat16 numbers are 8 apart, and row sums' 32
    once = 8 / 12**0.5  # root mean square of one rounding
    assert (skipped.double() - exact).square().mean().sqrt() <= 2 * once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("center", "at"), [(10.0, 0.0), (-40_000.0, 30_000.0)])
def test_a_center_far_from_the_values_does_not_round_them_away(dtype, center, at) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 64, dtype=dtype)
    pruning, x = Pruning(0.1, center), (torch.randn(1, 300) * 0.01 + at).to(dtype)
    with torch.no_grad():
        exact = pruning.values(x).double() @ linear.weight.double().t() + linear.bias.double()
    sparse = SparseLinear(linear, gives_zeros=True, pruning=pruning).eval()
    del linear
    with torch.no_grad():
        dense = sparse(x)
        with hf_sparse.backend("cpp"):
            skipped = sparse(x)
    errors = [float((y.double() - exact).abs().max()) for y in (skipped, dense)]
    assert errors[0] <= 2 * errors[1] + 1e-6 * float(exact.abs().max())


def test_a_center_that_the_dtype_cannot_hold_is_named() -> None:
    sparse = SparseLinear(nn.Linear(8, 8), gives_zeros=True, pruning=Pruning(0.1, 1e5)).half()
    with pytest.raises(PatchError, match="center=100000"):
        sparse(torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("pruning", [None, Pruning(0.1), Pruning(0.1, 0.25), Pruning(0.1, weighted=True)])
def test_a_bias_that_is_no_parameter_and_float64(pruning) -> None:
    linear = nn.Linear(20, 10)
    x = torch.randn(1, 20)
    expected = linear(x if pruning is None else pruning.values(x, column_norms(linear.weight)))
    sparse = SparseLinear(linear, gives_zeros=True, pruning=pruning).eval()
    prune.identity(sparse, "bias")
    assert torch.equal(sparse(x), expected)
    with torch.no_grad():
        assert torch.equal(sparse(x), expected)
        torch.testing.assert_close(sparse.double()(x.double()).float(), expected)


@pytest.mark.parametrize("pruning", [Pruning(0.4, 0.5), Pruning(0.3, weighted=True)])
@pytest.mark.parametrize("what", ["weight", "stock"])
def test_who_holds_a_weight_weakly_may_change_it(pruning, what) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 64)
    sparse = SparseLinear(linear, gives_zeros=True, pruning=pruning).eval()
    reference = weakref.ref(linear if what == "stock" else linear.weight)
    del linear
    x = torch.randn(1, 300)
    with torch.no_grad(), hf_sparse.backend("cpp"):
        for _ in range(2):  # the first one changes the layout
            sparse(x)
        getattr(reference(), "weight", reference()).data.mul_(3)
        found = sparse(x)
        del reference
        weight, bias = sparse.weight, sparse.bias
        expected = nn.functional.linear(pruning.values(x, column_norms(weight)), weight, bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["dense", "cpp"])
@pytest.mark.parametrize("when", ["while it is looked at", "just before"])
def test_a_thread_that_takes_a_weight_may_change_it(when, backend) -> None:
    torch.manual_seed(0)
    pruning = Pruning(0.3, weighted=True)
    sparse = SparseLinear(nn.Linear(300, 64), gives_zeros=True, pruning=pruning).eval()
    x = torch.randn(1, 300)
    with torch.no_grad(), hf_sparse.backend(backend):
        sparse(x)
        if when == "just before":  # a call comes when the layer has disclosed what it keeps
            disclose, calls = sparse.disclose, []

            def disclose_and_compute():
                disclose()
                if not calls:
                    calls.append(sparse(x))

            sparse.disclose = disclose_and_compute
            sparse.weight.data.mul_(3)
            del sparse.disclose
            assert calls
        else:
            make = sparse._vectors._made_by
            sparse._vectors.drop()

            def made_meanwhile(weight):
                made = make(weight)
                thread = threading.Thread(target=lambda: sparse.weight.data.mul_(3) is None)
                thread.start()
                thread.join()
                return made

            sparse._vectors._made_by = made_meanwhile
            sparse(x)
            sparse._vectors._made_by = make
        found = sparse(x)
        weight, bias = sparse.weight, sparse.bias
        expected = nn.functional.linear(pruning.values(x, column_norms(weight)), weight, bias)
    torch.testing.assert_close(found, expected)


def test_what_is_kept_of_a_weight_is_of_the_weight_as_it_is_now(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    up = model.model.layers[1].mlp.up_proj

    def check() -> None:
        reference = copy.deepcopy(model)
        hf_sparse.unpatch(reference)
        with torch.no_grad():
            expected = by_hand(reference)(input_ids[:1, :1]).logits
            with hf_sparse.backend("cpp"):
                torch.testing.assert_close(model(input_ids[:1, :1]).logits, expected)

    def held() -> list[bool]:
        return [one._vectors.is_held for one in model.modules() if isinstance(one, SparseLinear)]

    check()
    with torch.no_grad(), hf_sparse.backend("cpp"):
        model(input_ids[:1, :1])
    linears = [vars(layer.mlp)["_modules"]["gate_proj"] for layer in model.model.layers]
    assert all(one._vectors.is_held for one in linears)
    up.weight.data.mul_(3)  # torch counts no change
    check()
    weight = up.weight
    with torch.no_grad(), hf_sparse.backend("cpp"):
        model(input_ids[:1, :1])
    weight.data.add_(0.1)
    check()
    del weight
    with torch.no_grad():
        up.weight.add_(0.1)
    check()
    model.load_state_dict(tiny("llama", seed=1).state_dict())
    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert not any(held())
    check()


def test_gradients_are_those_of_the_pruned_function(input_ids) -> None:
    model = tiny("llama").train()
    reference = by_hand(copy.deepcopy(model))
    hf_sparse.patch(model, config())
    for one in (model, reference):
        one(input_ids, labels=input_ids).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_it_is_saved_loaded_copied_and_compiled(input_ids, tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    with torch.no_grad(), hf_sparse.backend("cpp"):
        model(input_ids[:1, :1])
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert hf_sparse.inspect(loaded).config == config()
    assert config().to_dict()["inputs"]["mlp.up_proj"] == {
        "threshold": 0.3,
        "center": list(CENTERED["center"]),
    }
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids).logits, expected)


def test_adapters_on_top_of_it(input_ids) -> None:
    model = tiny("llama")
    reference = by_hand(copy.deepcopy(model))
    hf_sparse.patch(model, config())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    torch.testing.assert_close(adapted(input_ids).logits, reference(input_ids).logits)
    merged = adapted.merge_and_unload()
    assert hf_sparse.inspect(merged).config == config()


def test_measured_sparsity_has_what_the_down_projection_leaves_out(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config(**{"mlp.down_proj": {"threshold": 0.001, "center": 0.0005}}))
    zeros = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: zeros.append(((args[0] - 0.0005).abs() <= 0.001).float().mean())
        )
    model(input_ids)
    expected = [float(z) for z in zeros]
    report = hf_sparse.measure(model, [{"input_ids": input_ids}])
    assert [layer.sparsity for layer in report.layers] == pytest.approx(expected)
    assert min(zeros) > 0


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"threshold": 0.1, "centre": 0.2}, "has the field 'centre'"),
        ({"center": 0.2}, "has no threshold"),
        ({"threshold": 0.1, "weighted": 1}, "it is true or false"),
        ({"threshold": -0.1, "weighted": True}, "is negative"),
        ({"threshold": 0.1, "center": float("inf")}, "not a finite number"),
        ({"threshold": (0.1, 0.2), "center": (0.1, 0.2, 0.3)}, "for 2 and 3 blocks"),
    ],
)
def test_a_config_that_says_nothing_clear_is_refused(value, named) -> None:
    with pytest.raises(ValueError, match=named):
        config(**{"mlp.up_proj": value})


def test_norms_of_a_part_of_a_weight_are_not_taken_for_those_of_the_whole(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config(**{"mlp.up_proj": {"threshold": 0.1, "weighted": True}}))
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight[:10].detach())
    with pytest.raises(PatchError, match="split over processes"):
        up(torch.randn(1, 32))


@given(
    st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.floats(-3, 3, width=32),
    st.floats(0.01, 0.99),
)
def test_what_is_near_a_center_is_that_of_all_values(values, center, share) -> None:
    x = torch.tensor(values)
    streamed = Distribution()
    for part in x.split(7):
        streamed.add(streamed.counted(part))
    assert streamed.total == len(x)
    lost, threshold = streamed.around(center, share)
    distances = (x.double() - center).abs()
    slack = float(x.abs().max()) * 2**-8 + 1e-30
    assert (distances <= threshold + slack).double().mean() >= share - 1e-9
    assert (distances < threshold - slack).double().mean() <= share + 1e-9
    assert streamed.within(center, threshold) >= share - 1e-9
    least, most = (
        float((distances[distances <= threshold + one] ** 2).sum() / len(x)) for one in (-slack, slack)
    )
    off = 4 * slack * (threshold + slack)
    assert least - off <= lost <= most + off
    middle = streamed.quantile(share)
    assert (x.double() <= middle + slack).double().mean() >= share - 1e-9


def test_the_mode_is_where_most_values_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator)
    gelu, found = nn.functional.gelu(x), Distribution()
    found.add(found.counted(gelu))
    assert found.mode() == pytest.approx(-0.15, abs=0.02)  # the least value of GELU is -0.17
    mixed, found = torch.cat([0.1 * x[:50_000] + 2, 0.5 * x]), Distribution()
    found.add(found.counted(mixed))
    assert found.mode() == pytest.approx(2.0, abs=0.05) or found.mode() == pytest.approx(0.0, abs=0.05)
    relu, found = x.relu(), Distribution()
    found.add(found.counted(relu))
    assert found.mode() == pytest.approx(0.0, abs=0.01)
    constant = Distribution()
    constant.add(constant.counted(torch.full((10,), 3.0)))
    assert constant.mode() == pytest.approx(3.0, rel=0.005)
