"""Weights that are perturbed for a second gradient, and put back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_sparse
from hf_sparse.sharpness import SAM, FisherSamConfig, SamConfig, read
from support.models import tiny, untrained_llama
from support.pairs import pairs
from support.sharp import IDS, WAYS, bits, built, loss, set_gradients, update


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return untrained_llama(num_hidden_layers=1)


def point(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(bits(one.parameters()), bits(other.parameters()), strict=True)
    )


def test_an_update_is_the_published_formula() -> None:
    # loss = w1^2 + 2 w2^2 at w = (2, 0.75): g = (4, 3), |g| = 5, eps = 0.5 g / 5 = (0.4, 0.3),
    # g' = (2 * 2.4, 4 * 1.05) = (4.8, 4.2), w' = w - 0.1 g' = (1.52, 0.33)
    w = point(2.0, 0.75)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = (torch.tensor([1.0, 2.0]) * w.square()).sum()
        value.backward()
        seen.append(w.tolist())
        return value

    assert optimizer.step(closure).item() == pytest.approx(4 + 2 * 0.75**2)
    assert seen[1] == pytest.approx([2.4, 1.05])
    assert w.tolist() == pytest.approx([1.52, 0.33])


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "loop": (torch.optim.AdamW, {"foreach": False}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_steps_with_the_second_gradient(name) -> None:
    make, options = OPTIMIZERS[name]
    model = llama()
    other = copy.deepcopy(model)
    optimizer, by_hand = (make(one.parameters(), lr=1e-2, **options) for one in (model, other))
    perturbation = SamConfig(rho=0.3).build(optimizer, model)
    for _ in range(3):
        update(model, optimizer, perturbation, [IDS])

        by_hand.zero_grad()
        loss(other, IDS).backward()
        moved = copy.deepcopy(other)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in other.parameters()))
        with torch.no_grad():
            for p, q in zip(moved.parameters(), other.parameters(), strict=True):
                p.add_(0.3 * q.grad / (norm + 1e-12))
        moved.zero_grad()
        loss(moved, IDS).backward()
        set_gradients(other.parameters(), [p.grad for p in moved.parameters()])
        by_hand.step()
    assert not same(model, llama())
    torch.testing.assert_close(model.state_dict(), other.state_dict(), atol=2e-4, rtol=1e-4)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
slopes = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.lists(floats, min_size=1, max_size=6), min_size=1, max_size=3),
    rho=st.floats(1e-3, 10),
    name=st.sampled_from(["sam", "fisher_sam", "sparse_sam_dynamic"]),
    data=st.data(),
)
def test_weights_move_by_the_masked_gradient_and_come_back_to_the_bit(weights, rho, name, data) -> None:
    own = [nn.Parameter(torch.tensor(one)) for one in weights]
    optimizer = torch.optim.SGD(own, lr=0.1)
    keep = {} if name == "sam" else {"keep": 0.6}
    perturbation = read({"name": name, "rho": rho, **keep}).build(optimizer, steps=10)
    gradients = [
        torch.tensor(data.draw(st.lists(slopes, min_size=p.numel(), max_size=p.numel()))) for p in own
    ]
    set_gradients(own, gradients)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    before = bits(own)
    old = [p.detach().clone() for p in own]
    with perturbation.perturbed():
        masks = perturbation.state_dict()["masks"].values()
        for w, p, g, mask in zip(old, own, gradients, masks, strict=True):
            eps = (rho / (norm + 1e-12) * g.double() * mask).float()
            torch.testing.assert_close(p.detach(), w + eps, equal_nan=True)
    assert all(torch.equal(a, b) for a, b in zip(bits(own), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_weights_come_back_to_the_bit_also_from_an_error(way) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    perturbation = built(way, model, optimizer)
    update(model, optimizer, perturbation, [IDS])
    optimizer.zero_grad()
    loss(model, IDS).backward()
    before = bits(model.parameters())

    def fails() -> None:
        with perturbation.perturbed():
            assert any(not torch.equal(a, b) for a, b in zip(bits(model.parameters()), before, strict=True))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert all(torch.equal(a, b) for a, b in zip(bits(model.parameters()), before, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_micro_batches_are_one_batch(way) -> None:
    models = [llama(), llama()]
    for model, size in zip(models, (8, 2), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        perturbation = built(way, model, optimizer)
        for _ in range(3):
            update(model, optimizer, perturbation, IDS.split(size))
    assert not same(models[0], llama())
    torch.testing.assert_close(*(model.state_dict() for model in models), atol=1e-4, rtol=1e-3)


def test_one_autocast_around_both_passes_does_not_hide_the_perturbation() -> None:
    """It keeps the weights in low precision until its end, or until it is told."""
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    perturbation = SamConfig(rho=8.0).build(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x).sum()
        first.backward()  # of each weight and bias: 2
        with perturbation.perturbed():
            inside = layer(x).sum()
        after = layer(x).sum()
    assert inside.item() == pytest.approx(first.item() + 40 * 8 * 2 / math.sqrt(20 * 4), abs=1)
    assert after.item() == first.item()


def test_a_scaled_loss_perturbs_as_one_that_is_not() -> None:
    models = [llama(), llama()]
    for model, start in zip(models, (1.0, 4096.0), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=start)
        perturbation = built("sam", model, optimizer)
        scaler.scale(loss(model, IDS)).backward()
        with perturbation.perturbed(scaler.get_scale()):
            optimizer.zero_grad()
            scaler.scale(loss(model, IDS)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not same(models[0], llama())
    torch.testing.assert_close(*(model.state_dict() for model in models))


@pytest.mark.parametrize("way", ["sam", "fisher_sam", "dynamic"])
def test_a_gradient_that_is_not_finite_perturbs_nothing(way) -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    perturbation = built(way, model, optimizer, **({} if way == "sam" else {"interval": 1}))
    masks = perturbation.state_dict()["masks"]
    before = bits(model.parameters())
    scaler.scale(loss(model, IDS)).backward()
    with perturbation.perturbed(scaler.get_scale()):
        assert all(torch.equal(a, b) for a, b in zip(bits(model.parameters()), before, strict=True))
        optimizer.zero_grad()
        scaler.scale(loss(model, IDS)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(bits(model.parameters()), before, strict=True))
    torch.testing.assert_close(perturbation.state_dict()["masks"], masks)


def test_a_zero_gradient_perturbs_nothing() -> None:
    w = point(1.0, -2.0)
    perturbation = SamConfig().build(torch.optim.SGD([w], lr=0.1))
    w.grad = torch.zeros(2)
    with perturbation.perturbed():
        assert w.tolist() == [1, -2]


def test_chosen_parameters_alone_are_perturbed_and_measured() -> None:
    model = tiny("llama", num_hidden_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturbation = SamConfig(rho=0.5, include=["*.mlp"], exclude=["*.1.*up_proj*"]).build(optimizer, model)
    loss(model, IDS).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with perturbation.perturbed():
        moves = {name: (p - before[name]).detach() for name, p in model.named_parameters()}
    moved = {name for name, move in moves.items() if move.any()}
    assert moved == {n for n in before if ".mlp." in n and n != "model.layers.1.mlp.up_proj.weight"}
    assert math.sqrt(sum(float(move.double().square().sum()) for move in moves.values())) == pytest.approx(
        0.5
    )


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model])
def test_names_are_those_of_the_bare_model(wrap) -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturbation = SamConfig().build(optimizer, wrap(model))
    assert list(perturbation.state_dict()["masks"]) == [name for name, _ in model.named_parameters()]


def test_without_a_model_names_are_those_of_the_optimizer() -> None:
    model = llama()
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert "model.norm.weight" in SamConfig().build(named).state_dict()["masks"]
    unnamed = torch.optim.SGD(model.parameters(), lr=0.1)
    assert list(SamConfig().build(unnamed).state_dict()["masks"])[:2] == ["0", "1"]


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_same_to_the_bit(way, tmp_path) -> None:
    def run(model: nn.Module, optimizer, perturbation, count: int) -> None:
        for _ in range(count):
            update(model, optimizer, perturbation, IDS.split(4))

    def fresh() -> tuple:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, built(way, model, optimizer, **({"seed": 7} if way == "dynamic" else {}))

    whole, first, second = fresh(), fresh(), fresh()
    run(*whole, 5)
    run(*first, 3)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    first[2].save(tmp_path / "sharpness.safetensors")
    second[2].load(tmp_path / "sharpness.safetensors")
    run(*second, 2)
    assert same(second[0], whole[0])
    torch.testing.assert_close(second[2].state_dict(), whole[2].state_dict())


def test_the_state_of_the_optimizer_that_takes_a_closure_is_whole() -> None:
    def fresh() -> tuple[nn.Module, SAM]:
        model = llama()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, SAM(base, model, name="fisher_sam", interval=3)

    def run(model: nn.Module, optimizer: SAM, count: int) -> None:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=10**6)
        for _ in range(count):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                value = loss(model, IDS)
                value.backward()
                return value

            optimizer.step(closure)
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 5e-3
        optimizer.param_groups[0]["lr"] = 1e-2

    whole, first, second = fresh(), fresh(), fresh()
    run(*whole, 2)
    run(*whole, 2)
    run(*first, 2)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    run(*second, 2)
    assert same(second[0], whole[0])


def test_a_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    model = llama()
    perturbation = built("dynamic", model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = perturbation.state_dict()
    state = perturbation.state_dict()
    for masks, message in (
        ({k: v for k, v in state["masks"].items() if "norm" not in k}, "other parameters"),
        ({**state["masks"], "model.norm.weight": torch.ones(3, dtype=torch.bool)}, "another model"),
        ({**state["masks"], "model.norm.weight": torch.ones(32)}, "another model"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbation.load_state_dict({"step": 5, "samples_due": 0, "masks": masks})
    torch.testing.assert_close(perturbation.state_dict(), before)


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    model = llama()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    perturbation = SamConfig().build(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="no saved sharpness"):
        perturbation.load(tmp_path / "other.safetensors")


def test_what_it_cannot_do_is_refused() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"include=.*matches no trained parameter"):
        SamConfig(include=["*.mpl.*"]).build(optimizer, model)
    with pytest.raises(ValueError, match="leave none"):
        SamConfig(exclude=["*"]).build(optimizer, model)
    with pytest.raises(ValueError, match="the model does not have"):
        SamConfig().build(optimizer, llama())
    with pytest.raises(ValueError, match="steps=None"):
        read("sparse_sam_dynamic").build(optimizer, model)
    with pytest.raises(ValueError, match="closure"):
        SAM(optimizer, model).step()
    with pytest.raises(RuntimeError, match="before SAM"):
        SAM(optimizer, model).add_param_group({"params": [point(1.0)]})
    with pytest.raises(RuntimeError, match="no parameter to perturb has a gradient"):
        perturb(SamConfig().build(optimizer, model))


def perturb(perturbation) -> None:
    with perturbation.perturbed():
        pass


def test_a_change_of_what_is_trained_is_noticed() -> None:
    w, other = point(1.0), point(2.0)
    optimizer = torch.optim.SGD([w], lr=0.1)
    perturbation = SamConfig().build(optimizer)
    optimizer.add_param_group({"params": [other]})
    w.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="build anew"):
        perturb(perturbation)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    perturbation = SamConfig().build(torch.optim.SGD(table.parameters(), lr=0.1), table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="'weight' is a sparse tensor"):
        perturb(perturbation)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "sma"}, "sharpness.name='sma' is not known; choose one of sam, "),
        ({"rho": 0.1}, "sharpness.name=None"),
        ({"name": "sam", "keep": 0.5}, r"unknown fields in sharpness \(sam\): keep"),
        ({"name": "sam", "rho": 0}, "sharpness.rho=0 .*positive"),
        ({"name": "sam", "rho": "0.1"}, "sharpness.rho='0.1' .*finite number"),
        ({"name": "sam", "include": "*.mlp"}, "sharpness.include=.*list"),
        ({"name": "sam", "exclude": [""]}, "sharpness.exclude=.*empty"),
        ({"name": "fisher_sam", "keep": 0}, "sharpness.keep=0 "),
        ({"name": "fisher_sam", "interval": 0}, "sharpness.interval=0 "),
        ({"name": "sparse_sam_fisher", "pattern": "4:2"}, "sharpness.pattern='4:2'"),
        ({"name": "sparse_sam_fisher", "pattern": "rows"}, "sharpness.pattern='rows'"),
        ({"name": "sparse_sam_fisher", "pattern": "2:4", "keep": 0.5}, "sharpness.keep=0.5 .*leave it out"),
        ({"name": "sparse_sam_fisher", "samples": 0}, "sharpness.samples=0 "),
        ({"name": "sparse_sam_dynamic", "drop": 1.5}, "sharpness.drop=1.5 "),
        ({"name": "sparse_sam_dynamic", "seed": -1}, "sharpness.seed=-1 "),
        ({"name": "sparse_sam_dynamic", "keep": True}, "sharpness.keep=True "),
        (3, "sharpness is a mapping"),
    ],
)
def test_a_wrong_field_is_named(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(given)


@pytest.mark.parametrize("way", WAYS)
def test_a_configuration_survives_json(way) -> None:
    config = read({**WAYS[way], "exclude": ["*norm*"]})
    assert read(config.to_dict()) == config
    assert config.to_dict()["name"] == WAYS[way]["name"]


def test_patterns_for_whole_parameters_have_to_match() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"sharpness.whole=.*matches none"):
        FisherSamConfig(whole=["*bias*"]).build(optimizer, model)


def rise(model: nn.Module, radius: float) -> float:
    """How much the loss rises on average in three random directions."""
    directions = torch.Generator().manual_seed(1)
    base, rises = loss(model, IDS).item(), []
    for _ in range(3):
        moved = copy.deepcopy(model)
        steps = [torch.randn(p.shape, generator=directions) for p in moved.parameters()]
        norm = torch.stack([step.norm() for step in steps]).norm()
        with torch.no_grad():
            for p, step in zip(moved.parameters(), steps, strict=True):
                p.add_(step * (radius / norm))
            rises.append(float(loss(moved, IDS)) - base)
    return sum(rises) / 3


@pytest.mark.slow
def test_every_way_ends_in_a_flatter_minimum() -> None:
    def trained(way: str | None, **changes: float) -> nn.Module:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        perturbation = None if way is None else built(way, model, optimizer, **changes)
        for _ in range(60):
            update(model, optimizer, perturbation, [IDS])
        return model.eval()

    plain = trained(None)
    assert loss(plain, IDS).item() < 0.5
    for way, rho in (("sam", 0.2), ("fisher", 0.3), ("2:4", 0.3), ("dynamic", 0.5), ("fisher_sam", 0.5)):
        flat = trained(way, rho=rho, **({} if way == "sam" else {"interval": 10}))
        assert loss(flat, IDS).item() < 0.5
        assert rise(flat, 2.0) < 0.75 * rise(plain, 2.0), way


@pytest.mark.parametrize(
    ("kind", "way", "name"), pairs(["llama", "opt"], ["sam", "fisher_sam", "2:4"], ["fused", "sgd"])
)
def test_a_patched_model_may_skip_between_updates_and_within(kind, way, name) -> None:
    """Evaluations that skip, in every place of an update, change nothing of a training."""
    make, options = OPTIMIZERS[name]

    def run(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = tiny(
            kind,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            **({"dropout": 0.0} if kind == "opt" else {}),
        )
        hf_sparse.patch(model, "relu")
        found = []

        def look() -> None:
            model.eval()
            with torch.no_grad(), hf_sparse.backend(backend):
                found.append(model(IDS[:1, :1], use_cache=False).logits.clone())
            model.train()

        look()
        optimizer = make(model.parameters(), lr=1e-2, **options)
        perturbation = built(way, model, optimizer)
        for _ in range(3):
            look()
            optimizer.zero_grad()
            loss(model, IDS).backward()
            look()
            with perturbation.perturbed():
                look()
                optimizer.zero_grad()
                loss(model, IDS).backward()
                look()
            optimizer.step()
            if perturbation.samples_due:
                perturbation.update_mask(
                    lambda one: loss(model, one["input_ids"]).backward(), {"input_ids": IDS[:4]}
                )
        look()
        return found

    dense, sparse = run("dense"), run("torch")
    assert not torch.allclose(dense[0], dense[-1], atol=0.1)
    torch.testing.assert_close(sparse, dense, atol=1e-3, rtol=1e-3)
