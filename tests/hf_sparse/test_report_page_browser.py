"""The page of a report in Chromium: nothing to scroll sideways on a phone, nothing cut off, no error."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hf_sparse
from hf_sparse.metrics import LayerSparsity
from hf_sparse.metrics.registry import metrics
from support.chromium import NAMES, chromium, shown
from support.models import tiny
from support.sites import padded, relu_model

BROWSER = chromium()
WIDTHS = (320, 360, 1280)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser: set HF_SPARSE_CHROMIUM, or install one of {', '.join(NAMES)}"
    ),
]


def whole_page() -> str:
    """Every section, with a name that is too long for a line."""
    model = relu_model("llama")
    batch = padded("right", (37, 9, 20, 34, 37, 33, 36, 35))
    report = hf_sparse.measure(model, [batch], metrics=metrics())
    before = hf_sparse.measure(tiny("llama"), [batch])
    beside = {f"runs/some-finetuning-{i}/report": replace(before, loss=5 - i / 10) for i in range(12)}
    names = {"model": model, "model_name": "organisation/" + "a" * 80}
    speed = hf_sparse.tune(model, tokens=(1, 4), force=True)
    cett = hf_sparse.cett_sparsity(model, [batch], 5.0)
    return report.to_html(**names, before=before, beside=beside, speed=speed, cett=cett)


def deep_page() -> str:
    """Eighty blocks, thousands of dead neurons."""
    layers = [
        LayerSparsity(
            name=f"model.language_model.layers.{i}.feed_forward",
            neurons=14336,
            tokens=100_000,
            zeros=14336 * (500 + i * 600),
            dead=i * 40,
        )
        for i in range(80)
    ]
    report = hf_sparse.SparsityReport(
        layers=tuple(layers), loss=2.0, tokens=100_000, predicted_tokens=99_900, sequence_length=1024
    )
    return report.to_html(before=report)


@pytest.mark.parametrize("page", [whole_page, deep_page])
def test_it_fits_and_is_without_errors(tmp_path, page):
    assert BROWSER is not None
    found, console = shown(BROWSER, page(), tmp_path, WIDTHS)
    assert console == []
    assert [one["scroll"] for one in found] == [one["width"] for one in found]
    assert [one["cut"] for one in found] == [[]] * 3
    assert all(one["height"] > 1000 for one in found)
    # On a narrow page the same is taller, so it was laid out anew.
    assert found[0]["height"] > found[2]["height"]
    assert found[0]["background"] == "rgb(255, 255, 255)"


def test_it_is_dark_where_the_reader_wants_that(tmp_path):
    assert BROWSER is not None
    found, console = shown(BROWSER, deep_page(), tmp_path, (360,), dark=True)
    assert console == []
    assert found[0]["background"] == "rgb(20, 23, 28)"


def test_what_does_not_fit_and_errors_are_seen(tmp_path):
    assert BROWSER is not None
    page = (
        '<!DOCTYPE html><html lang="en"><body style="margin:0"><div style="width:700px">x</div>'
        '<svg role="img" width="100"><rect width="no"/><text x="-50">out</text></svg></body></html>'
    )
    found, console = shown(BROWSER, page, tmp_path, (360,))
    assert found[0]["scroll"] >= 700
    assert found[0]["cut"] == ["out"]
    assert len(console) == 1
