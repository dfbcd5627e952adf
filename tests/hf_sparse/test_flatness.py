"""explain: the ratio of arXiv 2605.25612 against gradients of matrices that are copied for each token."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters import find_blocks
from hf_sparse.flatness import EffectiveGradient, KeyFlatness, ValueFlatness, spectrum
from hf_sparse.norms import preceding_norms
from hf_sparse.observing import blocks_of, observe
from support.models import tiny, tiny_t5
from support.own_copies import OwnCopies, multiplied, weight_of


class Case(NamedTuple):
    model_type: str
    patch: Any
    slope: Any
    """σ' by hand."""
    changes: dict[str, Any]


def relu(p: Tensor) -> Tensor:
    return (p > 0).to(p)


def jsrelu(p: Tensor) -> Tensor:
    return torch.where(p > 0, 1 + p, 0)


def _pruned(inputs: dict[str, Any]) -> SparsityConfig:
    names = ("gate_proj", "up_proj", "down_proj")
    return SparsityConfig(activation="relu", inputs={f"mlp.{name}": inputs for name in names})


CASES = {
    "opt as it comes with relu": Case("opt", None, relu, {"activation_function": "relu"}),
    "gpt2 relu": Case("gpt2", "relu", relu, {}),
    "gpt_neox relu2": Case("gpt_neox", "relu2", lambda p: 2 * p.clamp(min=0), {}),
    "llama relu": Case("llama", "relu", relu, {}),
    "llama jsrelu": Case("llama", "jsrelu", jsrelu, {}),
    "llama drelu": Case("llama", "drelu", relu, {}),
    "phi3 fatrelu": Case(
        "phi3", SparsityConfig.read("fatrelu", threshold=0.3), lambda p: (p >= 0.3).to(p), {}
    ),
    "llama with zeroth biases": Case(
        "llama", SparsityConfig(activation="jsrelu", zeroth_bias={"positions": 16}), jsrelu, {}
    ),
    "llama with teal": Case(
        "llama",
        SparsityConfig(activation="relu", inputs={"mlp.gate_proj": 0.4, "mlp.down_proj": 0.2}),
        relu,
        {},
    ),
    "llama with wina": Case("llama", _pruned({"threshold": 0.4, "weighted": True}), relu, {}),
    "llama with scap": Case("llama", _pruned({"threshold": 0.4, "center": -0.25}), relu, {}),
    "gemma with topk": Case("gemma", SparsityConfig(activation="relu", topk={"k": 9}), relu, {}),
}


def made(case: Case) -> nn.Module:
    model = tiny(case.model_type, **case.changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            least = -0.7 if case.model_type == "gemma" else 0.3  # it adds 1 to get its gain
            nn.init.uniform_(parameter, least, least + 1.2)
    if case.patch is not None:
        hf_sparse.patch(model, case.patch)
    for name, parameter in model.named_parameters():
        if "zeroth_bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def padded(side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (3, 8))
    if side == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, length in ((0, 3), (2, 5)):
        mask[row, slice(length) if side == "left" else slice(-length, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


class ByHand(NamedTuple):
    """Of one block, from the definitions; gradients are of the summed loss."""

    tokens: int
    density: float
    coefficient: float
    key_flatness: float
    value_flatness: float
    eta: Tensor
    """``∂L/∂p [T, F]``."""


def by_hand(model: nn.Module, batch: dict[str, Tensor], slope: Any, masks: Any = None) -> list[ByHand]:
    blocks = find_blocks(model)[0]
    text = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    masks = [text] * len(blocks) if masks is None else masks
    keys = [block.module.get_submodule(block.roles.names[0]) for block in blocks]
    downs = [block.module.get_submodule(block.roles.down) for block in blocks]
    # Of a layer that is gate and up in one, the gate is a half: the first in Phi-3.
    rows = [slice(block.intermediate_size) for block in blocks]
    inputs: list[Tensor] = [torch.empty(0)] * len(blocks)
    p: list[Tensor] = list(inputs)
    a: list[Tensor] = list(inputs)

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            p[index], a[index] = args[0], output
            args[0].retain_grad()
            output.retain_grad()

        return hook

    def keep_input(index: int) -> Any:
        return lambda key, args: inputs.__setitem__(index, multiplied(key, args[0].detach()))

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with OwnCopies(keys, rows) as of_keys, OwnCopies(downs) as of_downs:
        handles = [b.activation.register_forward_hook(keep(i)) for i, b in enumerate(blocks)]
        handles += [key.register_forward_pre_hook(keep_input(i)) for i, key in enumerate(keys)]
        total_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    found = []
    for i, mask in enumerate(masks):
        real = mask.flatten().nonzero().flatten().tolist()
        x_all, p_all, g_all, eta = (
            one.detach().flatten(0, -2) for one in (inputs[i], p[i], a[i].grad, p[i].grad)
        )
        products, count = [], 0
        for at in real:
            sigma = slope(p_all[at]).double()
            g, x = g_all[at].double(), x_all[at].double()
            count += len(sigma)
            products += (g[sigma != 0] * sigma[sigma != 0]).square().mul(x @ x).tolist()
        found.append(
            ByHand(
                tokens=len(real),
                density=len(products) / count,
                coefficient=sum(products) / len(products),
                key_flatness=of_keys.squared_gradients(i)[real].sum().item(),
                value_flatness=of_downs.squared_gradients(i)[real].sum().item(),
                eta=eta[real],
            )
        )
    return found


def total_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    if "labels" in batch:
        logits = model(**batch, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    mask = batch.get("attention_mask", torch.ones_like(ids))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if model.config.model_type == "opt" else {"position_ids": positions}  # OPT counts by itself
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
    pairs = [(b, s) for b, s in mask.nonzero().tolist() if s and mask[b, s - 1]]
    return torch.stack([cross_entropy(logits[b, s - 1], ids[b, s]) for b, s in pairs]).sum()


def assert_agrees(layer: hf_sparse.flatness.LayerFlatness, hand: ByHand) -> None:
    """The identity in numbers of the test alone, and each of them against what was found."""
    n = layer.neurons
    assert hand.density == pytest.approx(hand.key_flatness / (hand.tokens * n * hand.coefficient), rel=1e-5)
    assert layer.tokens == hand.tokens
    assert layer.density == hand.density
    assert layer.predicted_density == pytest.approx(hand.density, rel=1e-5)
    assert layer.keys.flatness == pytest.approx(hand.key_flatness, rel=1e-5)
    assert layer.coefficient == pytest.approx(hand.coefficient, rel=1e-5)
    assert layer.values.flatness == pytest.approx(hand.value_flatness, rel=1e-5)
    parts = layer.input_norm * layer.activation_gradient * layer.slope * layer.coupling
    assert parts == pytest.approx(layer.coefficient)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_density_is_flatness_of_copied_matrices_over_the_denominator(name, side) -> None:
    model = made(CASES[name])
    batch = padded(side)
    report = hf_sparse.explain(model, [batch])
    for layer, hand in zip(report.layers, by_hand(model, batch, CASES[name].slope), strict=True):
        assert 0.1 < layer.density < 0.9
        assert_agrees(layer, hand)


def test_density_is_the_ratio_in_both_stacks_of_t5() -> None:
    model = tiny_t5()
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = 0
    labels = torch.randint(2, 128, (3, 7))
    labels[0, 4:] = labels[2, 6:] = -100
    batch = {"input_ids": torch.randint(2, 128, (3, 9)), "attention_mask": mask, "labels": labels}
    report = hf_sparse.explain(model, [batch])
    masks = [mask, mask, labels != -100, labels != -100]
    for layer, hand in zip(report.layers, by_hand(model, batch, relu, masks), strict=True):
        assert_agrees(layer, hand)


def c4(assets, count: int, begin: int = 0) -> list[str]:
    import gzip

    with gzip.open(assets / "c4/c4-validation.00000-of-00001.json.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(begin + count), lines, strict=False)][
            begin:
        ]


def test_density_is_the_ratio_of_a_real_model_on_real_text(assets) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260K")
    hf_sparse.patch(model, "relu")
    ids = tokenizer(c4(assets, 1)[0], return_tensors="pt").input_ids[:, :96].reshape(2, 48)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    report = hf_sparse.explain(model, [batch])
    for layer, hand in zip(report.layers, by_hand(model, batch, relu), strict=True):
        assert_agrees(layer, hand)
    measured = hf_sparse.measure(model, [batch])
    assert report.density == pytest.approx(measured.density)
    assert report.loss == pytest.approx(measured.loss, rel=1e-6)

    report = hf_sparse.explain(model, c4(assets, 4, 1), tokenizer=tokenizer, max_tokens=2048)
    assert report.deviation < 1e-6
    assert report.tokens == 2048


def test_zeros_of_effective_gradients_are_counted_as_the_released_code_does() -> None:
    model = made(CASES["llama relu"])
    batch = padded("right")
    report = hf_sparse.explain(model, [batch])
    for layer, hand in zip(report.layers, by_hand(model, batch, relu), strict=True):
        seen, eta = layer.effective_gradient, hand.eta.double()
        assert seen.tokens == len(eta)
        assert seen.zeros == int((eta == 0).sum())
        assert layer.effective_gradient_density == pytest.approx((eta != 0).double().mean().item())
        assert seen.below_1e_3 == pytest.approx(int((eta.abs() < 1e-3).sum()), abs=1)  # of rounding
        assert seen.zeros <= seen.below_1e_9 <= seen.below_1e_6 < seen.below_1e_3
        assert seen.l1 == pytest.approx(eta.abs().sum().item(), rel=1e-5)
        assert seen.l2_squared == pytest.approx(eta.square().sum().item(), rel=1e-5)
        shares = [(one.abs().sum() ** 2 / (88 * one.square().sum())).item() for one in eta if one.any()]
        assert len(shares) < len(eta)  # the last token of a sequence predicts nothing
        assert layer.effective_gradient_share == pytest.approx(sum(shares) / len(eta), rel=1e-4)
        assert layer.effective_gradient_share < layer.effective_gradient_density


def same_sums(a: hf_sparse.FlatnessReport, b: hf_sparse.FlatnessReport) -> None:
    for one, other in zip(a.layers, b.layers, strict=True):
        for sums in ("keys", "values", "effective_gradient"):
            first, second = vars(getattr(one, sums)), vars(getattr(other, sums))
            assert first == pytest.approx(second, rel=1e-4, abs=1e-9, nan_ok=True)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert (a.tokens, a.predicted_tokens) == (b.tokens, b.predicted_tokens)


def test_parts_of_the_data_add_up_and_neither_batches_nor_padding_matter() -> None:
    model = made(CASES["llama jsrelu"])
    whole = padded("right")
    ids, mask = whole["input_ids"], whole["attention_mask"]
    mask[0, :5], mask[2, :3] = 1, 1
    mask[0, 5:], mask[2, 3:] = 0, 0
    parts = [{"input_ids": row[one.bool()][None]} for row, one in zip(ids, mask, strict=True)]
    report = hf_sparse.explain(model, [whole])
    same_sums(report, hf_sparse.explain(model, parts))
    same_sums(report, sum(hf_sparse.explain(model, [part]) for part in parts))
    other = hf_sparse.explain(made(CASES["llama jsrelu"]), [whole])
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp .* are not one block with the same weights"):
        report + other
    with pytest.raises(ValueError, match=r"3 MLP blocks .* and one of 4"):
        report + hf_sparse.explain(tiny_t5(), [{"input_ids": ids, "labels": ids}])


def test_the_model_is_left_as_it_was() -> None:
    model = made(CASES["llama relu"]).train()
    model.lm_head.weight.requires_grad_(False)
    hf_sparse.explain(model, [padded("none")])
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_of_a_dense_model_every_derivative_counts_and_the_report_says_what_that_leaves() -> None:
    model = made(Case("llama", None, None, {}))
    batch = padded("none")
    report = hf_sparse.explain(model, [batch])
    assert report.density == 1
    assert report.deviation < 1e-6
    hf_sparse.patch(model, "relu")
    relued = hf_sparse.explain(model, [batch])
    # In the first block the inputs are the same.
    assert report.layers[0].positive_density == relued.layers[0].density
    assert relued.layers[0].positive_density == relued.layers[0].density
    assert 0.5 < report.layers[0].keys.positive_flatness / report.layers[0].keys.flatness < 1
    assert relued.layers[0].keys.positive_flatness == relued.layers[0].keys.flatness
    assert "says nothing about silence" in str(report)
    assert "says nothing about silence" not in str(relued)
    jump = report.layers[0].outlooks[2]
    assert (jump.factor, jump.module) == (None, "jsrelu")
    assert "dense" in jump.note


@pytest.mark.parametrize("name", ["llama relu", "gpt_neox relu2", "gemma with topk", "llama with scap"])
def test_factors_of_the_denominator_are_those_of_lifted_gains_and_of_the_other_slope(name) -> None:
    case = CASES[name]
    model = made(case)
    batch = padded("none")
    seen: list[dict[str, Tensor]] = []
    blocks = find_blocks(model)[0]
    norms = preceding_norms(model, blocks)

    def keep(site: str, into: dict[str, Tensor]) -> Any:
        def look(values: Tensor, _: Any) -> None:
            values.retain_grad()
            into[site] = values

        return look

    handles = []
    for block in blocks:
        seen.append({})
        handles += [block.watch(site, keep(site, seen[-1])) for site in ("x", "p", "a")]
    total_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    report = hf_sparse.explain(model, [batch])
    for layer, block, at in zip(report.layers, blocks, seen, strict=True):
        norm = norms[block.place]
        gain = (norm.weight + norm.offset).detach().double()
        bias = 0.0 if norm.bias is None else norm.bias.detach().double()
        x, p, g2 = at["x"].detach().double(), at["p"].detach().double(), at["a"].grad.double().square()
        lifted = (x - bias) / gain * torch.where(gain < 0, -1, 1) * gain.abs().clamp(min=1) + bias
        key = block.module.get_submodule(block.roles.names[0])
        x, lifted = multiplied(key, x), multiplied(key, lifted)
        terms = g2 * case.slope(p).square()
        now = (terms.sum(-1) * x.square().sum(-1)).sum()
        then = (terms.sum(-1) * lifted.square().sum(-1)).sum()
        jumped = ((g2 * jsrelu(p).square()).sum(-1) * x.square().sum(-1)).sum()
        bias_outlook, norm_outlook, jump_outlook = layer.outlooks
        assert bias_outlook.factor is None
        assert 1.05 < norm_outlook.factor == pytest.approx((then / now).item(), rel=1e-4)
        assert jump_outlook.factor == pytest.approx((jumped / now).item(), rel=1e-4)


def test_a_block_without_a_norm_before_it_has_no_factor_for_one() -> None:
    model = tiny("olmo2")
    hf_sparse.patch(model, "jsrelu")
    layer = hf_sparse.explain(model, [padded("none")]).layers[0]
    _, norm, jump = layer.outlooks
    assert (norm.factor, norm.note) == (None, "no norm is known to give the block its very input")
    assert (jump.factor, jump.note) == (None, "in place")
    assert math.isnan(layer.keys.uplifted_product)
    json.loads(hf_sparse.explain(model, [padded("none")]).to_json())


def test_a_block_that_is_called_twice_counts_twice() -> None:
    model = made(CASES["llama relu"])
    model.model.layers[2].mlp = model.model.layers[0].mlp
    report = hf_sparse.explain(model, [padded("left")])
    counts = {layer.name: layer.tokens for layer in report.layers}
    assert counts == {"model.layers.0.mlp": 32, "model.layers.1.mlp": 16}
    assert report.deviation < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float64, 1e-6)])
def test_the_identity_holds_in_other_dtypes_to_their_rounding(dtype, tolerance) -> None:
    model = made(CASES["llama jsrelu"]).to(dtype)
    report = hf_sparse.explain(model, [padded("right")])
    assert report.deviation < tolerance


def test_under_an_adapter_the_key_matrix_is_what_both_compute_together() -> None:
    from peft import LoraConfig, get_peft_model

    model = made(CASES["llama relu"])
    batch = padded("none")
    config = LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    report = hf_sparse.explain(get_peft_model(model, config), [batch])
    assert report.deviation < 1e-6
    assert report.layers[0].key_spectrum is None
    assert report.layers[0].outlooks[1].factor > 1


# ---- refusals


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(PatchError, match=r"model\.layers\.0\.\S* \(MixtralExperts\) is of experts"):
        hf_sparse.explain(tiny("mixtral"), [padded("none")])


def test_activations_that_are_not_elementwise_are_refused() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, SparsityConfig(activation="relu", statistical_topk={"sparsity": 0.5}))
    with pytest.raises(PatchError, match=r"model\.layers\.0\.mlp has a statistical_topk"):
        hf_sparse.explain(model, [padded("none")])

    class Centred(nn.Module):
        def forward(self, p: Tensor) -> Tensor:
            return torch.relu(p - p.mean(-1, keepdim=True))

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Centred()
    with pytest.raises(PatchError, match="Centred is not elementwise"):
        hf_sparse.explain(model, [padded("none")])


def test_what_stands_between_key_and_activation_is_refused() -> None:
    model = tiny("gemma3n_text")
    with pytest.raises(PatchError, match="changes what gate_proj gives before it reaches the activation"):
        hf_sparse.explain(model, [padded("none")])


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_threshold_under_an_adapter_is_refused(name) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    hf_sparse.patch(model, SparsityConfig(activation="relu", inputs={f"mlp.{name}": 0.1}))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[name]))
    with pytest.raises(PatchError, match=f"{name} of .* has a threshold on its input and an adapter"):
        hf_sparse.explain(wrapped, [padded("none")])
    merged = wrapped.merge_and_unload()
    assert hf_sparse.explain(merged, [padded("none")]).deviation < 1e-6


def test_an_activation_that_overwrites_its_input_is_refused() -> None:
    model = tiny("opt")
    for layer in model.model.decoder.layers:
        layer.activation_fn = nn.ReLU(inplace=True)
    with pytest.raises(PatchError, match="changed in place later"):
        hf_sparse.explain(model, [padded("none")])


def test_a_block_that_the_loss_does_not_depend_on_is_refused() -> None:
    model = made(CASES["llama relu"])
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: 0 * output.detach())
    with pytest.raises(ValueError, match=r"site 'y' of model\.layers\.1\.mlp takes no gradient"):
        hf_sparse.explain(model, [padded("none")])


@pytest.mark.parametrize("kind", [KeyFlatness, ValueFlatness, EffectiveGradient])
def test_without_gradients_nothing_is_counted(kind) -> None:
    model = made(CASES["llama relu"])
    looks = [kind(block) for block in blocks_of(model)]
    with pytest.raises(ValueError, match=r"of model\.layers\.0\.mlp takes no gradient: observe was called"):
        observe(model, [padded("none")], looks)


# ---- spectra


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt"])
def test_spectra_are_those_of_the_matrices(family) -> None:
    model = tiny(family)
    hf_sparse.patch(model, "relu")
    report = hf_sparse.explain(model, [padded("none")])
    for layer, block in zip(report.layers, find_blocks(model)[0], strict=True):
        key = weight_of(block.module.get_submodule(block.roles.names[0]))[: block.intermediate_size]
        value = weight_of(block.module.get_submodule(block.roles.down))
        for found, matrix in ((layer.key_spectrum, key), (layer.value_spectrum, value)):
            values = torch.linalg.svdvals(matrix.detach().double())
            assert found.rank == found.size == len(values) == 32
            assert found.ratio == pytest.approx((values[0] / values[-1]).item(), rel=1e-5)
            assert found.norm_squared == pytest.approx(values.square().sum().item())
            # 26 of the 32 are at least 80 %.
            assert found.ratio_80 == pytest.approx(min(values[i] / values[i + 25] for i in range(7)).item())
    assert hf_sparse.explain(model, [padded("none")], spectrum_limit=31).layers[0].key_spectrum is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 50), (50, 200), (128, 128), (700, 700)])
def test_singular_values_that_rounding_made_are_not_counted(dtype, shape) -> None:
    left, right = torch.randn(shape[0], 20).double(), torch.randn(20, shape[1]).double()
    found = spectrum((left @ right).to(dtype))
    exact = torch.linalg.svdvals(left @ right)
    assert (found.rank, found.size) == (20, min(shape))
    assert found.ratio == pytest.approx((exact[0] / exact[19]).item(), rel=1e-2)
    full = spectrum(torch.randn(200, 50).to(dtype))
    assert full.rank == 50
    assert full.ratio < 4


def test_spectra_of_what_is_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.int8 of shape \[3, 4\]"):
        spectrum(torch.ones(3, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="not finite"):
        spectrum(torch.full((3, 4), torch.nan))
    nothing = spectrum(torch.zeros(3, 4))
    assert (nothing.rank, nothing.size) == (0, 3)
    assert math.isnan(nothing.ratio)
    assert math.isnan(nothing.ratio_80)


# ---- the report


def test_the_report_prints_and_saves_what_it_says(tmp_path) -> None:
    model = made(CASES["llama relu"])
    report = hf_sparse.explain(model, [padded("left")])
    text = str(report)
    head, _, *lines = text.splitlines()
    assert head.split()[:5] == ["MLP", "block", "density", "AF_K/T", "C"]
    for layer, line in zip(report.layers, lines, strict=False):
        assert line.split()[:2] == [layer.name, f"{layer.density:.2%}"]
        assert f"{layer.outlooks[1].factor:.2f}x" in line
    assert "exact: density = AF_K / (T n C)" in text
    assert "conjecture" in text
    assert "nothing bounds u" in text
    assert "nothing bounds u" not in str(hf_sparse.explain(made(CASES["gpt2 relu"]), [padded("none")]))
    saved = json.loads(report.to_json(tmp_path / "why.json"))
    assert json.loads((tmp_path / "why.json").read_text()) == saved == report.to_dict()
    assert saved["layers"][0]["predicted_density"] == pytest.approx(saved["layers"][0]["density"])
    assert [one["module"] for one in saved["layers"][0]["outlooks"]] == [
        "zeroth_bias",
        "restricted_norm",
        "jsrelu",
    ]


def test_a_limit_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="spectrum_limit=-1 is out of range"):
        hf_sparse.explain(tiny("llama"), [padded("none")], spectrum_limit=-1)
