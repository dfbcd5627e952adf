"""calibrate: from a dense model to a sparse one, without training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn
from torch.utils.data import RandomSampler

from hf_sparse.calibration import methods as _methods
from hf_sparse.calibration.method import Calibration
from hf_sparse.calibration.report import CalibrationReport
from hf_sparse.checks import number, shown
from hf_sparse.composite import LANGUAGE
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.inputs import named_thresholded
from hf_sparse.metrics.report import perplexity
from hf_sparse.modules import sparse_part
from hf_sparse.observing import BlockObserver, Pass, observe
from hf_sparse.patching import inspect, patch, transformers_model, unpatch

_HIGHEST = 0.99
_ROUNDS = 10
_CORRECTIONS = 5
_MISSED = 0.02
"""From which distance on that is told."""
_FEW = 256
"""Tokens below which what is found says little about other text."""
_NEAR = 0.005
"""How far from the target a sparsity may be that is not corrected."""


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
    ==============  =========================================================================================

    Args:
        model: a causal language model of transformers, stock or patched; a patched one keeps what it has.
        data: texts, rows with a ``"text"`` or batches, as :func:`hf_sparse.measure` takes them. They are gone
            through several times, so an iterator is refused, and a ``DataLoader`` that shuffles. Nothing is
            shared between processes: calibrate in one, and load the result in the others.
        method: the name of one.
        allocation: how the sparsity is spread; ``"uniform"``, or, of ``"teal"`` and ``"wina"``, ``"greedy"``:
            in each layer more where it changes the output of the layer less, found in some hundred forwards
            of each layer.
        target_sparsity: reach this sparsity, 0 to 1, of what the method prunes, on ``data``. What is pruned
            changes what the next layer gets, so it is measured, and corrected in some passes more. What is
            zero for another reason counts as well, such as what another method prunes.
        max_perplexity_increase: or be as sparse as possible, with a perplexity on ``data`` that is at most
            this many percent above that of the model without thresholds of this method.
        tokenizer: for texts; None loads the one of ``model.name_or_path``.
        sequence_length: tokens per window of text.
        batch_size: windows per forward.
        max_tokens: of ``data``; None means all.

    Raises:
        PatchError: the model cannot be patched, or the method does not suit it.
        ValueError: not one of the two aims is given, or it is out of range; no such method; see also
            :func:`hf_sparse.measure`.

    Warns:
        UserWarning: ``target_sparsity`` was missed by more than 2 points, or there are few tokens.

    """
    if method not in (known := methods()):
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

    def run(observers: list[BlockObserver]) -> Pass:
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
    one: Calibration = import_module(f"{_methods.__name__}.{method}").Method(base, given.blocks, before)
    if allocation not in one.allocations:
        raise ValueError(
            f"allocation={shown(allocation)} is none of method {method!r}; use "
            f"{' or '.join(one.allocations)}."
        )
    one.allocation = allocation

    def loss(level: float) -> float:
        _set(base, one.config(level))
        return run([]).loss

    def sparsity(level: float) -> tuple[float, Pass]:
        _set(base, one.config(level))
        counters = one.counters(inspect(base, part=LANGUAGE).blocks)
        found = run(counters)
        return one.counted(counters), found

    with _undone_on_failure(base, before):
        _set(base, one.base)
        dense = run(one.observers(inspect(base, part=LANGUAGE).blocks))
        if dense.tokens < _FEW:
            warnings.warn(
                f"thresholds are chosen on {dense.tokens} tokens, and on other text they may give another "
                f"sparsity and perplexity than the report says; give some thousand, at least {_FEW}.",
                stacklevel=2,
            )
        one.finish(_HIGHEST if target_sparsity is None else target_sparsity)
        if target_sparsity is not None:
            level, reached, after = _corrected(one, sparsity, target_sparsity)
            if abs(reached - target_sparsity) > _MISSED:
                warnings.warn(
                    f"target_sparsity={target_sparsity} was asked for, and the nearest that was found is "
                    f"{reached:.3f}, of {one.counts}. What other methods prune already counts as well: ask "
                    "for more than that, or calibrate this method first.",
                    stacklevel=2,
                )
        else:
            assert max_perplexity_increase is not None
            level = _level_within(loss, dense.loss + math.log1p(max_perplexity_increase / 100))
            reached, after = sparsity(level)
        _set(base, one.config(level))
        one.blocks = inspect(base, part=LANGUAGE).blocks
        one.settle(level)
        config = inspect(base, part=LANGUAGE).config
        assert config is not None
    return CalibrationReport(
        method=method,
        counts=one.counts,
        config=config,
        sparsity=reached,
        perplexity_before=perplexity(dense.loss),
        perplexity=perplexity(after.loss),
        tokens=after.tokens,
    )


def methods() -> tuple[str, ...]:
    """Their names, those of the files that they are in."""
    return tuple(sorted(one.name for one in iter_modules(_methods.__path__) if not one.name.startswith("_")))


def _level_of(one: Calibration, sparsity: float) -> float:
    """Where ``sparsity`` is expected."""
    low, high = 0.0, 1.0
    if one.expected(high) < sparsity - 0.005:
        raise ValueError(
            f"target_sparsity={sparsity} is above the {one.expected(high):.1%} that this method and "
            "allocation reach; ask for less."
        )
    if one.expected(low) > sparsity + 0.005:
        raise ValueError(
            f"target_sparsity={sparsity} is below the {one.expected(low):.1%} that the model has without any "
            "threshold; ask for more."
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if one.expected(middle) <= sparsity else (low, middle)
    return low


def _corrected(
    one: Calibration, measured: Callable[[float], tuple[float, Pass]], target: float
) -> tuple[float, float, Pass]:
    """The level of the measured sparsity nearest to ``target``, that sparsity, and the pass that found it."""
    wanted, found = target, []
    for _ in range(_CORRECTIONS):
        level = _level_of(one, wanted)
        found.append((level, *measured(level)))
        missed = target - found[-1][1]
        if abs(missed) <= _NEAR:
            break
        wanted = min(max(wanted + missed, one.expected(0.0)), one.expected(1.0))
    return min(found, key=lambda tried: abs(target - tried[1]))


def _level_within(loss: Callable[[float], float], allowed: float) -> float:
    """The highest level, to 0.1 %, whose loss is at most ``allowed``; the loss is taken to grow with it."""
    low, high = 0.0, _HIGHEST
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) <= allowed else (low, middle)
    return low


@contextmanager
def _undone_on_failure(base: Any, before: SparsityConfig | None) -> Iterator[None]:
    known = {name: part.density for name, part in _parts(base)}
    try:
        yield
    except BaseException:
        _set(base, before)
        raise
    finally:
        for name, part in _parts(base):  # patching again makes them anew
            if part.density is None:
                part.density = known.get(name)


def _parts(base: Any) -> list[tuple[str, Any]]:
    """What keeps a density: patched blocks, and linear layers with thresholds."""
    blocks = [(block.name, sparse_part(block.module)) for block in inspect(base, part=LANGUAGE).blocks]
    return [(name, part) for name, part in blocks if part is not None] + list(named_thresholded(base))


def _set(base: Any, config: SparsityConfig | None) -> None:
    now = inspect(base, part=LANGUAGE).config
    if config is None:
        if now is not None:
            unpatch(base, part=LANGUAGE)
    elif config != now:
        patch(base, config, part=LANGUAGE)
