"""Which weights are perturbed: by Fisher information, at random, in patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_sparse.sharpness import Perturbation, read
from hf_sparse.sharpness.part import Part
from hf_sparse.sharpness.patterns import n_of_m, structured, unstructured
from hf_sparse.sharpness.select import float_keys, largest
from support.models import tiny
from support.sharp import IDS, built, loss, one_sample, set_gradients


def parts_of(tensors: Sequence[Tensor], **options: str) -> list[Part]:
    return [Part(str(i), nn.Parameter(tensor), **options) for i, tensor in enumerate(tensors)]


def masks_of(perturbation: Perturbation) -> dict[str, Tensor]:
    return perturbation.state_dict()["masks"]


def moved(perturbation: Perturbation, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What the perturbation adds to the parameters."""
    before = [p.detach().clone() for p in parameters]
    with perturbation.perturbed():
        return [(p - old).detach() for p, old in zip(parameters, before, strict=True)]


few = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1e-30, 1e-45, 3e38])  # many are equal
scores = st.lists(st.lists(few | st.floats(width=32, allow_nan=False), max_size=8), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(values=scores, data=st.data())
def test_the_largest_of_many_tensors_are_those_of_a_stable_sort(values, data) -> None:
    tensors = [torch.tensor(one) for one in values]
    every = torch.cat(tensors).abs()
    count = data.draw(st.integers(0, len(every)))
    found = largest([float_keys(tensor) for tensor in tensors], count, parts_of(tensors))
    wanted = torch.zeros(len(every), dtype=torch.bool)
    wanted[every.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(torch.cat(found), wanted)


def test_pieces_of_a_large_tensor_are_one(monkeypatch) -> None:
    value = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    wanted = largest([float_keys(value)], 40, parts_of([value]))
    monkeypatch.setattr("hf_sparse.sharpness.select._PIECE", 4)
    assert torch.equal(largest([float_keys(value)], 40, parts_of([value]))[0], wanted[0])
    assert int(wanted[0].sum()) == 40


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(1, 9), m=st.integers(1, 5), data=st.data())
def test_n_of_m_are_taken_along_the_inputs(rows, length, m, data) -> None:
    n = data.draw(st.integers(1, m))
    count = rows * length
    score = torch.tensor(data.draw(st.lists(few.map(abs), min_size=count, max_size=count))).view(rows, length)
    wanted = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for begin in range(0, length, m):
            group = score[row, begin : begin + m]
            wanted[row, begin + group.sort(descending=True, stable=True).indices[:n]] = True
    assert torch.equal(n_of_m([score], n, m, parts_of([score]))[0], wanted)
    columns = score.t().contiguous()
    assert torch.equal(n_of_m([columns], n, m, parts_of([columns], inputs="transposed"))[0], wanted.t())
    patches = score.view(rows, 1, length, 1)
    assert torch.equal(
        n_of_m([patches], n, m, parts_of([patches], inputs="flat"))[0], wanted.view_as(patches)
    )
    assert n_of_m([score[0]], n, m, parts_of([score[0]])) == [True]


@pytest.mark.parametrize(
    ("kind", "name", "along"),
    [
        ("llama", "model.layers.0.mlp.down_proj.weight", 1),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", 0),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", 2),
    ],
)
def test_the_inputs_of_each_kind_of_layer_are_found(kind, name, along) -> None:
    model = tiny(kind, **({"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturbation = built("2:4", model, optimizer)
    fill_masks(perturbation, model)
    groups = masks_of(perturbation)[name].transpose(along, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert torch.equal(groups, torch.full_like(groups, 2))


def fill_masks(perturbation: Perturbation, model: nn.Module) -> None:
    loss(model, IDS).backward()
    with perturbation.perturbed():
        pass
    perturbation.update_mask(one_sample(model), {"input_ids": IDS[:4]})


def test_structured_masks_take_parameters_by_their_mean() -> None:
    fisher = [torch.tensor([9.0, 0.0, 0.0, 0.0]), torch.tensor([3.0, 3.0]), torch.tensor([2.5] * 4)]
    parts = parts_of(fisher)
    assert structured(fisher, 0.2, parts) == [False, True, False]
    assert structured(fisher, 0.3, parts) == [False, True, True]  # the second brings more than is left
    assert structured(fisher, 1.0, parts) == [True, True, True]
    assert structured(fisher, 0.01, parts) == [False, True, False]


def test_a_fisher_mask_by_hand() -> None:
    one, two = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([one, two], lr=0.1)
    gradients = [torch.tensor([[1.0, -4.0], [0.0, 2.0]]), torch.tensor([0.5, -3.0, 2.0])]
    fisher_sam = read({"name": "fisher_sam", "keep": 3 / 7, "rho": 1.0, "interval": 2})
    perturbation = fisher_sam.build(optimizer)
    set_gradients([one, two], gradients)
    moves = moved(perturbation, [one, two])
    norm = math.sqrt(1 + 16 + 4 + 0.25 + 9 + 4)  # of the whole gradient, though three entries move
    assert torch.allclose(moves[0], torch.tensor([[0.0, -4.0], [0.0, 2.0]]) / norm)  # the first of the two 2s
    assert torch.allclose(moves[1], torch.tensor([0.0, -3.0, 0.0]) / norm)

    set_gradients([one, two], [gradients[0], gradients[1] * 10])
    assert moved(perturbation, [one, two])[1].tolist()[0] == 0  # the mask is kept for two updates
    set_gradients([one, two], [gradients[0], gradients[1] * 10])
    assert (moved(perturbation, [one, two])[1] != 0).all()


def test_what_the_released_code_perturbs_whole_can_be() -> None:
    model = tiny("opt", num_hidden_layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturbation = built("fisher_sam", model, optimizer, whole=["*bias*", "*embed*"])
    loss(model, IDS).backward()
    with perturbation.perturbed():
        pass
    masks = masks_of(perturbation)
    whole = {name for name, mask in masks.items() if mask.ndim == 0}
    assert whole == {name for name in masks if "bias" in name or "embed" in name}
    others = torch.cat([mask.flatten() for name, mask in masks.items() if name not in whole])
    assert int(others.sum()) == round(0.1 * len(others))


def test_a_parameter_without_gradient_has_no_fisher_information() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4))
    perturbation = read({"name": "fisher_sam", "keep": 0.5}).build(torch.optim.SGD([used, unused], lr=0.1))
    used.grad = torch.tensor([1.0, 2.0])
    moves = moved(perturbation, [used, unused])
    assert (moves[0] != 0).all()
    assert not moves[1].any()
    assert [int(mask.sum()) for mask in masks_of(perturbation).values()] == [2, 1]


def test_fisher_information_is_of_single_samples() -> None:
    # Over the batch the gradients of the first entry cancel; of single samples they are the largest.
    w = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([w], lr=0.1)
    perturbation = read({"name": "sparse_sam_fisher", "keep": 1 / 3, "samples": 2}).build(optimizer)
    w.grad = torch.tensor([1.0, 2.0, 3.0])
    assert not moved(perturbation, [w])[0].any()  # there is no mask yet
    assert perturbation.samples_due == 2
    w.grad = kept = torch.tensor([7.0, 7.0, 7.0])
    batch = {"x": torch.tensor([[5.0, 1.0, 0.0], [-5.0, 1.0, 4.0]])}
    perturbation.update_mask(lambda sample: (sample["x"][0] * w).sum().backward(), batch)
    assert masks_of(perturbation)["0"].tolist() == [True, False, False]
    assert w.grad is kept
    assert perturbation.samples_due == 0
    assert (moved(perturbation, [w])[0] != 0).tolist() == [True, False, False]
    assert perturbation.samples_due == 0


def test_a_mask_is_due_at_the_first_update_and_each_interval() -> None:
    model = tiny("llama", num_hidden_layers=1)
    perturbation = built("fisher", model, torch.optim.SGD(model.parameters(), lr=0.1), interval=3)
    due = []
    for _ in range(7):
        loss(model, IDS).backward()
        with perturbation.perturbed():
            pass
        due.append(perturbation.samples_due)
        if due[-1]:
            perturbation.update_mask(one_sample(model), {"input_ids": IDS[:4]})
    assert due == [4, 0, 0, 4, 0, 0, 4]


def test_a_mask_that_was_forgotten_is_asked_for() -> None:
    model = tiny("llama", num_hidden_layers=1)
    perturbation = built("fisher", model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model, IDS).backward()
    with pytest.raises(ValueError, match="0 are due"):
        perturbation.update_mask(one_sample(model), {"input_ids": IDS[:4]})
    moved(perturbation, list(model.parameters()))
    with pytest.raises(RuntimeError, match="update_mask was to be given 4 samples after update 1"):
        moved(perturbation, list(model.parameters()))
    with pytest.raises(ValueError, match="given 3 samples over all processes, and 4 are due"):
        perturbation.update_mask(one_sample(model), {"input_ids": IDS[:3]})
    with pytest.raises(ValueError, match=r"have \[3, 4\] samples"):
        perturbation.update_mask(one_sample(model), {"input_ids": IDS[:3], "labels": IDS[:4]})


def test_samples_without_a_finite_gradient_leave_the_mask() -> None:
    w = nn.Parameter(torch.zeros(2))
    perturbation = read({"name": "sparse_sam_fisher", "samples": 1}).build(torch.optim.SGD([w], lr=0.1))
    for factor, wanted in ((math.inf, False), (1.0, [True, False])):
        w.grad = torch.ones(2)
        moved(perturbation, [w])
        batch = {"x": torch.tensor([[2.0 * factor, 1.0]])}
        perturbation.update_mask(lambda sample: (sample["x"][0] * w).sum().backward(), batch)
        assert masks_of(perturbation)["0"].tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(keep=st.floats(0.05, 1), drop=st.floats(0, 1), interval=st.integers(1, 3), seed=st.integers(0, 10**9))
def test_a_dynamic_mask_keeps_its_share_and_exchanges_what_the_schedule_says(
    keep, drop, interval, seed
) -> None:
    own = [nn.Parameter(torch.zeros(30, 10)), nn.Parameter(torch.zeros(100))]
    fields = {"keep": keep, "drop": drop, "interval": interval, "seed": seed}
    config = read({"name": "sparse_sam_dynamic", **fields})
    before = torch.get_rng_state()
    perturbation = config.build(torch.optim.SGD(own, lr=0.1), steps=6)
    size = round(keep * 400)
    noise = torch.Generator().manual_seed(seed)
    for step in range(1, 7):
        mask = torch.cat([one.flatten() for one in masks_of(perturbation).values()])
        assert int(mask.sum()) == size
        gradients = [torch.randn(p.shape, generator=noise) for p in own]
        set_gradients(own, gradients)
        move = torch.cat([one.flatten() for one in moved(perturbation, own)])
        assert torch.equal(move != 0, mask)  # a new mask serves from the next update on
        new = torch.cat([one.flatten() for one in masks_of(perturbation).values()])
        share = drop / 2 * (1 + math.cos(math.pi * step / 6)) if step % interval == 0 else 0
        gone = mask & ~new
        assert int(gone.sum()) == min(round(size * share), 400 - size)
        size_of = torch.cat([gradient.flatten() for gradient in gradients]).abs()
        if gone.any() and (mask & new).any():
            assert size_of[gone].max() <= size_of[mask & new].min()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dynamic_mask_is_random_and_of_its_seed() -> None:
    def start(seed: int) -> Tensor:
        own = nn.Parameter(torch.zeros(200, 200))
        config = read({"name": "sparse_sam_dynamic", "keep": 0.3, "seed": seed})
        return masks_of(config.build(torch.optim.SGD([own], lr=0.1), steps=1))["0"].float()

    one, other = start(0), start(1)
    assert torch.equal(one, start(0))
    # 40,000 entries: four standard deviations of what independent ones would give.
    assert abs(float((one * other).mean()) - 0.09) < 4 * 0.29 / 200
    for dim in (0, 1):
        assert abs(float((one * one.roll(1, dim)).mean()) - 0.09) < 4 * 0.29 / 200
    assert float((one.mean(0) - 0.3).abs().max()) < 5 * 0.46 / math.sqrt(200)


def test_the_share_is_over_all_parameters() -> None:
    fisher = [torch.full((4,), 1.0), torch.full((4,), 2.0)]
    found = unstructured(fisher, 0.5, parts_of(fisher))
    assert [mask.tolist() for mask in found] == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("name", ["sparse_sam_fisher", "sparse_sam_dynamic", "fisher_sam"])
def test_a_share_of_no_entry_is_refused(name) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"sharpness.keep=0.1 cannot be used: of so few"):
        read({"name": name, "keep": 0.1}).build(optimizer, steps=1)
