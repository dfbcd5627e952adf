"""calibrate: from a dense model to a sparse one, without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import RandomSampler

from hf_sparse.calibration.best import BEST, MISSED, best
from hf_sparse.calibration.report import CalibrationReport, TriedMethod
from hf_sparse.calibration.search import Aim, method_on, methods, search
from hf_sparse.calibration.state import undone_on_failure
from hf_sparse.checks import number, shown
from hf_sparse.composite import LANGUAGE
from hf_sparse.errors import PatchError
from hf_sparse.metrics.report import perplexity
from hf_sparse.observing import BlockObserver, Pass, observe
from hf_sparse.patching import inspect, transformers_model

_FEW = 256
"""Tokens below which what is found says little about other text."""


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: str = "teal",
    allocation: str = "uniform",
    target_sparsity: float | None = None,
    max_perplexity_increase: float | None = None,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = 65_536,
) -> CalibrationReport:
    """Make ``model`` sparse without training: thresholds on its activations, chosen on ``data``.

    The model is patched with what was found, as :func:`hf_sparse.patch` does it: it saves, loads and pushes,
    ``generate`` skips, and :func:`hf_sparse.unpatch` undoes it. What goes wrong leaves it as it was.

    ==============  =========================================================================================
    ``"teal"``      small inputs of every linear layer of attention and MLP are taken for zero (TEAL,
                    arXiv 2408.14690); where all layers have the same `nn.Linear`s
    ``"wina"``      the same of inputs times the norms of the columns that they meet (WINA, arXiv 2505.19427)
    ``"scap"``      inputs of the MLP's linear layers near a constant, their mode, are taken for it (SCAP,
                    arXiv 2412.07174)
    ``"cats"``      small values of SiLU or GELU are taken for zero (CATS, arXiv 2404.08763); for models
                    with either
    ``"fatrelu"``   a threshold in the place of ReLU's zero (ProSparse, arXiv 2402.13516); for models with
                    ReLU
    ``"best"``      each of these that suits the model is tried, and the best one kept
    ==============  =========================================================================================

    The sparsities of methods are shares of different things. With ``"best"`` the measure is the share of the
    weights of the linear layers of attention and MLP that a token does not need. Where a target is given,
    each method prunes as much as that takes, and the one with the least perplexity on ``data`` is kept; where
    a rise of perplexity is given, the one that leaves most weights unread.

    Args:
        model: a causal language model of transformers, stock or patched; a patched one keeps what it has.
        data: texts, rows with a ``"text"`` or batches, as :func:`hf_sparse.measure` takes them. They are gone
            through several times, so an iterator is refused, and a ``DataLoader`` that shuffles. Nothing is
            shared between processes: calibrate in one, and load the result in the others.
        method: the name of one, or ``"best"``, which takes as long as all of them and is for a model without
            thresholds.
        allocation: how the sparsity is spread; ``"uniform"``, or, of ``"teal"`` and ``"wina"``, ``"greedy"``:
            in each layer more where it changes the output of the layer less, found in some hundred forwards
            of each layer. Of ``"best"`` it is uniform.
        target_sparsity: reach this sparsity, 0 to 1, of what the method prunes, on ``data``; with ``"best"``
            of the weights, and a method that cannot reach it is left out. What is pruned changes what the
            next layer gets, so it is measured, and corrected in some passes more. What is zero for another
            reason counts as well, such as what another method prunes.
        max_perplexity_increase: or be as sparse as possible, with a perplexity on ``data`` that is at most
            this many percent above that of the model without thresholds of this method.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text.
        batch_size: windows per forward.
        max_tokens: of ``data``; None means all.

    Raises:
        PatchError: the model cannot be patched, or the method does not suit it; of ``"best"``, no method
            does, or it has thresholds already.
        ValueError: not one of the two aims is given, or it is out of range; no such method; see also
            :func:`hf_sparse.measure`.

    Warns:
        UserWarning: ``target_sparsity`` was missed by more than 2 points, or there are few tokens.

    """
    if method not in (known := (*methods(), BEST)):
        raise ValueError(f"method={shown(method)} is not known; choose one of {', '.join(known)}.")
    if (target_sparsity is None) == (max_perplexity_increase is None):
        raise ValueError("give target_sparsity or max_perplexity_increase: one of them is the aim.")
    if target_sparsity is not None and not 0 < number("target_sparsity", target_sparsity) < 1:
        raise ValueError(f"target_sparsity={target_sparsity} is out of range; it is a share, as 0.5.")
    most = max_perplexity_increase
    if most is not None and number("max_perplexity_increase", most) <= 0:
        raise ValueError(f"max_perplexity_increase={most} is out of range; it is in percent, as 1.0.")
    if isinstance(data, Iterator):
        raise ValueError("data is an iterator, and calibrate goes through it several times; give a list.")
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise ValueError(
            "data is a DataLoader that shuffles, and each of several passes would see other text; give one "
            "with shuffle=False."
        )
    base = transformers_model(model)

    def run(observers: Sequence[BlockObserver]) -> Pass:
        return observe(
            model,
            data,
            observers,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
        )

    given = inspect(base, part=LANGUAGE)
    before = given.config
    if before is not None and before.activation.mix != 1:
        raise PatchError(
            f"the activation of the model is mixed in by {before.activation.mix:.0%} only; finish the "
            "finetune, or hf_sparse.set_mix(model, 1)."
        )
    aim = Aim(sparsity=target_sparsity, increase=most, of_weights=method == BEST)
    tried: tuple[TriedMethod, ...] = ()
    with undone_on_failure(base, before):
        if method == BEST:
            _require_allocation(method, allocation, ("uniform",))
            found, tried = best(methods(), base, before, run, aim)
        else:
            one = method_on(method, base, before)
            _require_allocation(method, allocation, one.allocations)
            one.allocation = allocation
            found = search(one, run, aim)
        if found.dense.tokens < _FEW:
            warnings.warn(
                f"thresholds are chosen on {found.dense.tokens} tokens, and on other text they may give "
                "another sparsity and perplexity than the report says; give some thousand, at least "
                f"{_FEW}.",
                stacklevel=2,
            )
        if not tried and target_sparsity is not None and abs(found.sparsity - target_sparsity) > MISSED:
            warnings.warn(
                f"target_sparsity={target_sparsity} was asked for, and the nearest that was found is "
                f"{found.sparsity:.3f}, of {found.one.counts}. What other methods prune already counts as "
                "well: ask for more than that, or calibrate this method first.",
                stacklevel=2,
            )
        found.apply()
        config = inspect(base, part=LANGUAGE).config
        assert config is not None
    return CalibrationReport(
        method=tried[0].method if tried else method,
        counts=found.one.counts,
        config=config,
        sparsity=found.sparsity,
        perplexity_before=perplexity(found.dense.loss),
        perplexity=perplexity(found.after.loss),
        tokens=found.after.tokens,
        tried=tried,
    )


def _require_allocation(method: str, allocation: str, known: Sequence[str]) -> None:
    if allocation not in known:
        raise ValueError(
            f"allocation={shown(allocation)} is none of method {method!r}; use {' or '.join(known)}."
        )
