"""Perturbed weights in several processes (gloo): what one process does, up to rounding."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import run_on_two
from support.sharp import IDS, STEPS, WAYS
from support.sharp_sharded import SAMPLES, WRAPS, fresh, llama, random_mask, result, train


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("sharp")
    run_on_two("support.sharp_sharded", folder)
    return torch.load(folder / "found.pt"), folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(found, way) -> None:
    model, optimizer, perturbation = fresh(way, lambda model: model)
    train(model, optimizer, perturbation, IDS, IDS[SAMPLES], STEPS)
    wanted, start = result(model, perturbation), dict(llama().named_parameters())
    for kind in WRAPS:
        got = found[0][f"{way} {kind}"]
        assert got["masks"].keys() == wanted["masks"].keys()
        assert got["weights"].keys() == wanted["weights"].keys()
        torch.testing.assert_close(got["weights"], wanted["weights"], atol=1e-4, rtol=1e-3)
        # Of scores that are equal but for rounding, another one may be the larger.
        masks = [torch.cat([mask.flatten() for mask in one["masks"].values()]) for one in (got, wanted)]
        assert len(masks[0]) == len(masks[1])
        assert (masks[0] != masks[1]).float().mean() < 1e-3
    assert any(not torch.allclose(wanted["weights"][name], p, atol=1e-2) for name, p in start.items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fisher", "2:4", "dynamic", "fisher_sam"])
def test_masks_saved_by_two_sharded_processes_load_in_one(found, way) -> None:
    _, _, perturbation = fresh(way, lambda model: model)
    perturbation.load(found[1] / f"{way}-fsdp2.safetensors")
    state = perturbation.state_dict()
    assert state["step"] == 3
    assert {name: mask.shape for name, mask in state["masks"].items() if mask.ndim} == {
        name: p.shape for name, p in llama().named_parameters() if state["masks"][name].ndim
    }
    _, _, other = fresh(way, lambda model: model)
    other.load(found[1] / f"{way}-ddp.safetensors")
    masks = [
        torch.cat([m.flatten() for m in one.state_dict()["masks"].values()]) for one in (perturbation, other)
    ]
    assert (masks[0] != masks[1]).float().mean() < 1e-3


@pytest.mark.slow
def test_random_masks_do_not_depend_on_the_sharding(found) -> None:
    torch.testing.assert_close(found[0]["random by columns"], random_mask(llama(88)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")
def test_deepspeed_is_refused() -> None:
    run_on_two("support.sharp_zero")
