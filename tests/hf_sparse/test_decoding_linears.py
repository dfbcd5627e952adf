"""Linear layers of a prepared model: attention, output, MLPs that run dense; a few tokens at a time."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import hf_sparse
import triton_ops
from hf_sparse.modules import DecodingLinear, SparseLinear
from support.backends import change_backend
from support.compiler import needs_compiler
from triton_ops import Problem, break_even
from triton_ops.backends import REGISTRY

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_cache")]
TOKEN = torch.tensor([[5]])


@pytest.fixture
def multiplied(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of weights that the kernel multiplies, now that no weight is too small for it."""
    shapes: list[tuple[int, ...]] = []
    kernel = REGISTRY["cpp"].linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return kernel(x, weight, bias)

    change_backend(monkeypatch, "cpp", linear=linear, native=lambda: False)  # which would not be heard
    with hf_sparse.backend("cpp"):
        yield shapes


def prepared(tiny_model, name: str = "llama", **config):
    model = tiny_model(name, **config)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    return model


def plain(model: nn.Module) -> int:
    """How many linear layers there are that could be multiplied."""
    return sum(type(m) is nn.Linear for m in model.modules())


def test_layers_that_skip_multiply_likewise_where_they_run_dense(tiny_model, multiplied) -> None:
    """A down projection that somebody holds, in a block that stays a module."""
    model = tiny_model("opt")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    held = [module.weight for module in model.modules() if isinstance(module, SparseLinear)]
    assert held
    with torch.inference_mode():
        model(TOKEN)
    assert sum(shape == tuple(held[0].shape) for shape in multiplied) >= len(held)


def test_every_type_computes_what_it_did(any_type, tiny_model, multiplied) -> None:
    model = tiny_model(any_type)
    hf_sparse.patch(model, "relu")
    before, classes = plain(model), {name: type(m) for name, m in model.named_modules()}
    with torch.no_grad():
        expected = model(TOKEN)[0]
        assert not multiplied
        hf_sparse.prepare(model)
        assert plain(model) == 0
        torch.testing.assert_close(model(TOKEN)[0], expected, rtol=1e-4, atol=1e-5)
    assert bool(multiplied) == bool(before)  # GPT-2 has Conv1D everywhere but before the tied output
    hf_sparse.unpatch(model)
    stock = {name: type(m) for name, m in tiny_model(any_type).named_modules()}
    assert {name: type(m) for name, m in model.named_modules()} == stock
    hf_sparse.patch(model, "relu")
    assert {name: type(m) for name, m in model.named_modules()} == classes


def test_all_but_what_skips_is_multiplied(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    with torch.no_grad():
        model(TOKEN)
    # Four of attention in each of three layers, and the output; the MLPs skip.
    assert len(multiplied) == 13
    assert multiplied[-1] == tuple(model.lm_head.weight.shape)
    multiplied.clear()
    hf_sparse.prepare(model, linears=False)
    with torch.no_grad():
        model(TOKEN)
    assert not multiplied
    assert type(model.lm_head) is nn.Linear


def test_an_mlp_that_runs_dense_is_multiplied(tiny_model, multiplied) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original")
    hf_sparse.prepare(model)
    with torch.no_grad():
        model(TOKEN)
    assert len(multiplied) == 13 + 9


def test_a_threshold_that_does_not_pay_is_multiplied(tiny_model, multiplied) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original", inputs={"self_attn.q_proj": 0.1})
    linear = model.model.layers[0].self_attn.q_proj
    linear.gives_zeros = False
    with torch.no_grad():
        model(TOKEN)
    assert multiplied == [tuple(linear.weight.shape)]


def test_where_torch_is_faster_it_is_called(tiny_model, monkeypatch) -> None:
    calls: list[int] = []
    kernel = REGISTRY["cpp"].linear

    def linear(x, weight, bias):
        calls.append(x.shape[-2])
        return kernel(x, weight, bias)

    change_backend(monkeypatch, "cpp", linear=linear)
    model = prepared(tiny_model)
    head = model.lm_head.weight.shape
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad():
        model(TOKEN)
        assert calls == []  # all weights of this model are small
        break_even.store("cpp", Problem("dense_linear", *head, torch.float32, "cpu"), (1.0, 0.0, 1.0))
        for tokens in (1, 2, 3, 4):
            model(ids.repeat(1, 2)[:, :tokens])
    assert calls == [1, 3]


def test_tune_measures_each_shape_once(tiny_model) -> None:
    model = prepared(tiny_model)
    report = hf_sparse.tune(model, tokens=(1, 2))
    shapes = {m.problem[1:3] for m in report.measurements if m.problem.form == "dense_linear"}
    linears = [m for m in model.modules() if isinstance(m, DecodingLinear)]
    assert shapes == {tuple(m.weight.shape) for m in linears}
    assert sum(one.count for one in report.linears) == len(linears)
    for one in report.linears:
        assert one.break_even == break_even.measured("cpp", one.problem)
        assert one.shape in str(report)
    assert hf_sparse.tune(model, tokens=(1, 2)).measurements == ()
    hf_sparse.prepare(model, linears=False)
    assert hf_sparse.tune(model, tokens=(1, 2)).linears == ()


def test_gradients_are_those_of_torch(tiny_model, input_ids, multiplied) -> None:
    model = prepared(tiny_model)
    other = copy.deepcopy(model)
    hf_sparse.prepare(other, linears=False)
    for one in (model, other):
        one(input_ids[:1, :2], labels=input_ids[:1, :2]).loss.backward()
    assert not multiplied
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_training_and_decoding_take_turns(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(TOKEN.repeat(1, 3), labels=TOKEN.repeat(1, 3)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            now = model(TOKEN).logits
        with torch.no_grad(), hf_sparse.backend("dense"):
            torch.testing.assert_close(now, model(TOKEN).logits, rtol=1e-4, atol=1e-5)
    assert len(multiplied) == 2 * (13 + 9)  # what the optimizer holds does not skip


def test_who_counts_or_replaces_calls_sees_those_of_torch(tiny_model, monkeypatch, multiplied) -> None:
    model = prepared(tiny_model)
    head = model.lm_head
    x = torch.randn(1, 1, head.in_features)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            head(x)
        assert flops.get_total_flops() == 2 * head.weight.numel()
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype == torch.bfloat16
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: x.new_zeros(7))
        assert head(x).tolist() == [0.0] * 7
        monkeypatch.undo()
        assert head(x).shape == (1, 1, head.out_features)


def test_hooks_are_called(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    model.lm_head.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    with torch.no_grad():
        assert not model(TOKEN).logits.any()
    assert seen == [(1, 1, model.lm_head.out_features)]


def test_functional_calls_take_the_given_weight(tiny_model, multiplied) -> None:
    head = prepared(tiny_model).lm_head
    x, other = torch.randn(1, 1, head.in_features), torch.randn_like(head.weight)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(head, {"weight": other}, (x,)),
            F.linear(x, other),
            rtol=1e-4,
            atol=1e-5,
        )
        batched = torch.func.vmap(lambda w: torch.func.functional_call(head, {"weight": w}, (x,)))
        stacked = torch.stack([other, head.weight])
        torch.testing.assert_close(
            batched(stacked), torch.stack([F.linear(x, w) for w in stacked]), rtol=1e-4, atol=1e-5
        )


def test_tangents_come_through(tiny_model, multiplied) -> None:
    head = prepared(tiny_model).lm_head
    x, t = torch.randn(2, 1, 1, head.in_features).unbind()
    with torch.no_grad():
        _, tangent = torch.func.jvp(head, (x,), (t,))
        with torch.autograd.forward_ad.dual_level():
            dual = head(torch.autograd.forward_ad.make_dual(x, t))
            again = torch.autograd.forward_ad.unpack_dual(dual).tangent
        expected = F.linear(t, head.weight)
    for one in (tangent, again):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strided", ["transposed", "expanded", "empty", "many", "double"])
def test_any_input(tiny_model, multiplied, strided) -> None:
    head = prepared(tiny_model).lm_head
    x = {
        "transposed": torch.randn(head.in_features, 2).t(),
        "expanded": torch.randn(1, head.in_features).expand(3, -1),
        "empty": torch.randn(0, head.in_features),
        "many": torch.randn(2, 9, head.in_features),
        "double": torch.randn(1, head.in_features, dtype=torch.float64),
    }[strided]
    with torch.no_grad():
        if strided == "double":
            with pytest.raises(RuntimeError, match="dtype"):
                head(x)
            return
        torch.testing.assert_close(head(x), F.linear(x, head.weight), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="shape"):
            head(x[..., :-1])


def test_lora_on_top(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        now = model(TOKEN).logits
        assert len(multiplied) == 13
        with hf_sparse.backend("dense"):
            torch.testing.assert_close(now, model(TOKEN).logits, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(TOKEN).logits, now, rtol=1e-3, atol=1e-4)
    hf_sparse.unpatch(merged)
    assert not any(isinstance(m, DecodingLinear) for m in merged.modules())


def test_under_lora_it_is_prepared(tiny_model, multiplied) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    hf_sparse.prepare(model)
    with torch.no_grad():
        model(TOKEN)
    assert len(multiplied) == 13 + 6  # the adapters as well


def test_tools_that_change_the_weight(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    head, x = model.lm_head, torch.randn(1, 1, model.lm_head.in_features)
    expected = F.linear(x, head.weight.detach() * 2)

    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    with torch.no_grad():
        parametrize.register_parametrization(head, "weight", Twice())
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)
        parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)
        prune.l1_unstructured(head, "weight", 0.5)
        torch.testing.assert_close(head(x), F.linear(x, head.weight), rtol=1e-4, atol=1e-5)
        prune.remove(head, "weight")
        torch.testing.assert_close(head(x), F.linear(x, head.weight), rtol=1e-4, atol=1e-5)


def test_tools_that_change_the_bias(tiny_model, multiplied) -> None:
    layer = prepared(tiny_model, "qwen2").model.layers[0].self_attn.q_proj
    x = torch.randn(1, 1, layer.in_features)

    class Twice(nn.Module):
        def forward(self, bias):
            return bias * 2

    with torch.no_grad():
        layer.bias.normal_()
        prune.l1_unstructured(layer, "bias", 0.5)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
        prune.remove(layer, "bias")
        parametrize.register_parametrization(layer, "bias", Twice())
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
        parametrize.remove_parametrizations(layer, "bias")
        bias = layer.bias.detach()
        del layer.bias
        layer.register_buffer("bias", bias)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, bias), rtol=1e-4, atol=1e-5)


def test_a_class_of_another_tool_is_not_overlooked(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
    for undo in (hf_sparse.unpatch, lambda m: hf_sparse.prepare(m, linears=False)):
        with pytest.raises(hf_sparse.PatchError, match="are parametrised, or sharded"):
            undo(model)
    assert hf_sparse.inspect(model).patched
    parametrize.remove_parametrizations(model.lm_head, "weight")
    hf_sparse.unpatch(model)
    assert type(model.lm_head) is nn.Linear


def test_a_forward_that_somebody_replaces_is_called(tiny_model, monkeypatch, multiplied) -> None:
    model = prepared(tiny_model)
    called: list[nn.Module] = []
    stock = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or stock(self, x))
    with torch.no_grad():
        model(TOKEN)
    assert not multiplied
    assert called[-1] is model.lm_head


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_for_torch(tiny_model, multiplied, dtype) -> None:
    head = prepared(tiny_model).lm_head.to(dtype)
    x = torch.randn(1, 1, head.in_features, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(head(x), F.linear(x, head.weight))
    assert not multiplied


def test_a_layout_that_changes_during_a_call_changes_nothing(tiny_model, monkeypatch) -> None:
    """As another thread may change that of a down projection, between any two lines of the caller."""
    model = tiny_model("llama")
    hf_sparse.patch(model, "original")
    hf_sparse.prepare(model)
    layer = model.model.layers[0].mlp.down_proj
    kernel = REGISTRY["cpp"].linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        strides = weight.stride()
        triton_ops.neuron_major_(layer.weight)
        assert weight.stride() == strides
        return kernel(x, weight, bias)

    change_backend(monkeypatch, "cpp", linear=linear)
    x = torch.randn(1, 1, layer.in_features)
    with torch.no_grad(), hf_sparse.backend("cpp"):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-4, atol=1e-5)
    assert triton_ops.is_neuron_major(layer.weight)


def test_copies_pickles_and_checkpoints(tiny_model, tmp_path, multiplied) -> None:
    model = prepared(tiny_model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(TOKEN).logits
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), loaded):
            torch.testing.assert_close(other(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
        twin = copy.deepcopy(model)
        twin.lm_head.weight.zero_()
        assert not twin(TOKEN).logits.any()
        assert torch.equal(model(TOKEN).logits, expected)
    assert type(loaded.lm_head) is nn.Linear
    assert list(model.state_dict()) == list(loaded.state_dict())


def test_patching_anew_and_in_part(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    hf_sparse.patch(model, "original", inputs={"self_attn.q_proj": 0.1, "mlp.up_proj": 0.1})
    assert isinstance(model.model.layers[0].self_attn.q_proj, SparseLinear)
    hf_sparse.patch(model, "relu", layers=[1])
    assert isinstance(model.model.layers[0].self_attn.q_proj, DecodingLinear)
    hf_sparse.unpatch(model)
    assert plain(model) == plain(tiny_model("llama"))


def test_a_failed_prepare_changes_nothing(tiny_model) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "original")
    with pytest.raises(hf_sparse.PatchError, match="certify=True needs"):
        hf_sparse.prepare(model, certify=True)
    assert not any(isinstance(m, DecodingLinear) for m in model.modules())


def test_compiled(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    with torch.no_grad():
        expected = model(TOKEN).logits
        multiplied.clear()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(multiplied) == 13


def test_an_exported_graph_runs_without_this_package(tiny_model, multiplied) -> None:
    head = prepared(tiny_model).lm_head
    x = torch.randn(1, 1, head.in_features)
    with torch.no_grad():
        program = torch.export.export(head, (x,))
        torch.testing.assert_close(program.module()(x), F.linear(x, head.weight), rtol=1e-4, atol=1e-5)
    assert not [n for n in program.graph.nodes if "hf_sparse" in str(n.target)]


def test_offloaded_by_accelerate(tiny_model, multiplied) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = prepared(tiny_model)
    with torch.no_grad():
        expected = model(TOKEN).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
        hf_sparse.prepare(model)
        torch.testing.assert_close(model(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
        remove_hook_from_submodules(model)
        torch.testing.assert_close(model(TOKEN).logits, expected, rtol=1e-4, atol=1e-5)
    hf_sparse.prepare(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    hf_sparse.unpatch(model)
    remove_hook_from_submodules(model)
    forwards = {getattr(vars(m).get("forward"), "__func__", None) for m in model.modules()}
    assert DecodingLinear.forward not in forwards
    assert not any(isinstance(m, DecodingLinear) for m in model.modules())


def test_all_of_generate(tiny_model, multiplied) -> None:
    model = prepared(tiny_model)
    settings = {"max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(TOKEN, **settings)
    assert len(multiplied) == 8 * 13
    with hf_sparse.backend("dense"):
        assert torch.equal(model.generate(TOKEN, **settings), tokens)
    assert triton_ops.plan(model.lm_head.weight, "dense_linear").skipping == "cpp"
