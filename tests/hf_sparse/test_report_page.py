"""A report as a page: all its numbers, nothing from elsewhere, and text that stays text."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_sparse
from hf_sparse import report_page
from hf_sparse.cli import main
from hf_sparse.cli.measure import names_of
from hf_sparse.metrics import LayerSparsity
from hf_sparse.metrics.cett_report import CETTReport, LayerTail
from hf_sparse.metrics.registry import metrics
from hf_sparse.metrics.union import BATCHES, CHUNKS
from hf_sparse.report_page.axes import around, from_zero
from hf_sparse.report_page.charts import Point
from hf_sparse.report_page.comparison import front
from hf_sparse.report_page.svg import HEIGHT
from support.html_pages import Element, Page
from support.models import tiny
from support.sites import padded, relu_model, seen

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' & `x` | [a](http://b.c) "
    "www.d.e f@g.h \x00\x1b\u202e\ud800 *b*\n\n# h"
)
UNION = "Density of the union over consecutive tokens"


@pytest.fixture(scope="module")
def measured():
    """A model, a batch, and its report with every metric."""
    torch.manual_seed(0)
    model = relu_model("llama")
    batch = padded("right", (37, 9, 20, 34, 37, 33, 36, 35))
    return model, batch, hf_sparse.measure(model, [batch], metrics=metrics())


@pytest.fixture(scope="module")
def dense():
    return hf_sparse.measure(tiny("llama"), [padded("right")])


def made_up(
    name: str = "model.layers.{}.mlp", loss: float = 1.0, tokens: int = 200
) -> hf_sparse.SparsityReport:
    """A report of three blocks of 10 neurons."""
    layers = [
        LayerSparsity(name=name.format(i), neurons=10, tokens=tokens, zeros=tokens * (i + 5), dead=i)
        for i in range(3)
    ]
    return hf_sparse.SparsityReport(
        layers=tuple(layers), loss=loss, tokens=tokens, predicted_tokens=tokens - 2, sequence_length=100
    )


def tails(neurons: int = 10) -> CETTReport:
    """What may be left out of the blocks of :func:`made_up`: 40, 50 and 60 %."""
    layers = tuple(
        LayerTail(
            name=f"model.layers.{i}.mlp",
            neurons=neurons,
            threshold=0.125 * (i + 1),
            sparsity=(4 + i) / 10,
            zeros=i / 10,
        )
        for i in range(3)
    )
    return CETTReport(
        layers=layers,
        p=1.5,
        cett=0.2,
        loss_before=1.0,
        loss=1.0149,
        tokens=200,
        predicted_tokens=198,
        sequence_length=100,
    )


def charts(page: Page) -> dict[str, Element]:
    """The charts by their titles."""
    found = [one for one in page.find("svg") if one.attributes.get("role") == "img"]
    return {one.find("title")[0].text: one for one in found}


def headings(page: Page) -> list[str]:
    return [one.text for one in page.find("h2")]


# ---- the numbers


def test_every_number_by_layer_is_in_a_table(measured):
    model, batch, report = measured
    page = Page(report.to_html(model=model))
    for layer, one in zip(report.layers, seen(model, [batch]), strict=True):
        h = torch.cat(one.h)
        row = page.row("Sparsity by block", layer.name)
        zeros = (h == 0).double()
        assert row["sparsity"] == f"{zeros.mean():.2%}"
        assert row["density"] == f"{1 - zeros.mean():.2%}"
        assert (row["neurons"], row["tokens"]) == ("88", str(len(h)))
        row = page.row("Neurons that are dead, or always on", layer.name)
        assert row["dead"] == str(int((h == 0).all(0).sum()))
        assert row["always on"] == str(int(((h != 0).double().mean(0) > 0.99).sum()))
        active = (h != 0).sum(1).sort().values
        row = page.row("Densities that so many of the tokens do not exceed", layer.name)
        assert row["median token"] == f"{active[math.ceil(len(active) / 2) - 1] / 88:.2%}"
        p = torch.cat(one.p)
        row = page.row("Derivative sparsity by block", layer.name)
        assert row["derivative sparsity"] == f"{(p <= 0).double().mean():.2%}"
        assert row["activation sparsity"] == f"{zeros.mean():.2%}"
    rows = page.tables()
    (cett,) = (table for caption, table in rows.items() if "CETT" in caption)
    assert cett[1:] == [list(row) for row in report.metrics["cett"].rows() if row is not None][1:]
    assert "all blocks" in {row[0] for row in rows["Sparsity by block"]}


def test_unions_are_in_tables_beside_those_of_independent_tokens(measured):
    model, batch, report = measured
    page = Page(report.to_html(model=model))
    densities = []
    for layer, one in zip(report.layers, seen(model, [batch]), strict=True):
        sequences = [h != 0 for h in one.h]
        row = page.row(UNION, layer.name)
        for n in CHUNKS:
            chunks = [s[at : at + n].any(0) for s in sequences for at in range(0, len(s) - n + 1, n)]
            assert row[str(n)] == f"{torch.stack(chunks).double().mean():.2%}"
        densities.append(torch.cat(sequences).double().mean())
    row = page.row(UNION, "were tokens independent")
    for n in CHUNKS:
        assert row[str(n)] == f"{sum(1 - (1 - d) ** n for d in densities) / 3:.2%}"
    row = page.row("Density of the union over sequences of a batch", "all blocks")
    shares = report.metrics["union"].total()
    titles = [f"{n} sequence{'s' if n > 1 else ''}" for n in BATCHES]
    assert [row[str(n)] for n in BATCHES] == [f"{shares[title]:.2%}" for title in titles]


def test_bars_are_as_high_as_their_numbers(measured):
    _, _, report = measured
    page = Page(report.to_html(before=report))
    chart = charts(page)["Sparsity by MLP block"]
    for style in ("main", "other"):
        bars = [one for one in chart.find("rect") if one.attributes["class"] == style]
        for bar, layer in zip(bars, report.layers, strict=True):
            height, y = float(bar.attributes["height"]), float(bar.attributes["y"])
            assert height == pytest.approx(layer.sparsity * HEIGHT, abs=0.1)
            assert y + height == pytest.approx(HEIGHT, abs=0.1)
            assert bar.text.endswith(f"{100 * layer.sparsity:.2f}")


def test_headline_numbers_stand_beside_those_of_before(measured, dense):
    model, batch, report = measured
    old = hf_sparse.measure(tiny("llama"), [batch])
    page = Page(report.to_html(model=model, before=old))
    told = page.find("dl")[0].text
    for number in (f"{report.sparsity:.2%}", f"{report.perplexity:.4g}", f"{report.loss:.4f}"):
        assert number in told
    rise = 100 * (report.perplexity / old.perplexity - 1)
    assert f"before: {old.perplexity:.4g} ({rise:+.1f} %)" in told
    assert page.row("Sparsity by block", report.layers[0].name)["sparsity before"] == "0.00%"
    other = Page(report.to_html(before=dense))  # which is of another text
    assert "the text was not the same" in other.find("main")[0].text
    assert "(+" not in other.find("dl")[0].text
    assert "(-" not in other.find("dl")[0].text


def test_facts_of_the_model_and_of_the_process(measured):
    model, _, report = measured
    page = Page(report.to_html(model=model, data="a batch"))
    facts = {row[0]: row[1] for row in page.tables()["The model, the text and the process"]}
    assert facts["Activation"] == "relu in place of silu"
    assert facts["MLP blocks"] == "3 x gated, 32 to 88"
    assert facts["Dtype, device"] == "float32; cpu"
    assert facts["Data"] == "a batch"
    assert f"torch {torch.__version__}" in facts["Versions"]
    assert str(report.predicted_tokens) in facts["Tokens"]
    alone = {row[0] for row in Page(report.to_html()).tables()["The model, the text and the process"]}
    assert alone == {"Fact", "Model", "Data", "Tokens", "Page written"}


def test_a_path_of_a_model_is_told_by_its_last_part(tmp_path, measured):
    model, _, report = measured
    before = model.config._name_or_path
    model.config._name_or_path = model.name_or_path = str(tmp_path / "my-model")
    try:
        text = report.to_html(model=model)
    finally:
        model.config._name_or_path = model.name_or_path = before
    assert "my-model" in text
    assert str(tmp_path) not in text


def test_sections_without_data_are_left_out():
    page = Page(made_up().to_html())
    assert headings(page) == ["In short", "What was measured", "Sparsity by layer", "Dead neurons"]
    unknown = replace(made_up(), layers=tuple(replace(one, dead=None) for one in made_up().layers))
    assert headings(Page(unknown.to_html())) == headings(page)[:3]
    assert "?" not in unknown.to_html()


def test_experts_whose_unions_are_not_known_are_said_to_be_so():
    model = tiny("mixtral")
    report = hf_sparse.measure(model, [padded("none")], metrics=["density", "union"])
    page = Page(report.to_html(model=model))
    assert "Several tokens at once" in headings(page)
    assert UNION not in page.tables()
    assert page.row("Densities that so many of the tokens do not exceed", report.layers[0].name)


def test_a_block_that_no_token_reached_has_no_bar():
    report = made_up()
    layers = (replace(report.layers[0], tokens=0, zeros=0), *report.layers[1:])
    page = Page(replace(report, layers=layers).to_html())
    assert (
        len(
            [
                one
                for one in charts(page)["Sparsity by MLP block"].find("rect")
                if one.attributes["class"] == "main"
            ]
        )
        == 2
    )
    assert page.row("Sparsity by block", report.layers[0].name)["sparsity"] == "-"
    assert "reached by no token" in page.find("main")[0].text


# ---- beside other reports


def test_reports_that_do_not_compare_are_in_the_table_and_not_in_the_plot():
    beside = {
        "good": made_up(loss=0.5),
        "other text": made_up(tokens=400),
        "diverged": made_up(loss=math.inf),
    }
    page = Page(made_up().to_html(model_name="own", beside=beside))
    chart = charts(page)["Sparsity against perplexity"]
    assert [one.text.split(":")[0] for one in chart.find("circle")] == ["good", "own"]
    drawn = {row[0]: row[-1] for row in page.tables()["The reports of the plot"][1:]}
    assert drawn == {"own": "no", "good": "yes", "other text": "not drawn", "diverged": "not drawn"}
    assert "Not drawn: 3, 4." in page.find("main")[0].text


def test_without_a_perplexity_that_is_a_number_there_is_no_plot():
    report = made_up(loss=math.nan)
    page = Page(report.to_html(beside={"other": made_up(loss=math.inf)}))
    assert "Sparsity against perplexity" not in charts(page)
    assert {row[-1] for row in page.tables()["The reports of the plot"][1:]} == {"not drawn"}
    assert "not finite" in page.find("dl")[0].text
    assert "nan" not in page.root.text


def test_an_axis_that_is_logarithmic_says_so():
    def text(loss: float) -> str:
        return Page(made_up().to_html(beside={"other": made_up(loss=loss)})).root.text

    assert "The axis of perplexity is logarithmic" in text(5.0)
    assert "logarithmic" not in text(1.5)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=9))
def test_nothing_beats_what_is_on_the_front(pairs):
    points = [Point(label=str(i), name="", x=x, y=y) for i, (x, y) in enumerate(pairs)]
    found = front(points)

    def beats(a: Point, b: Point) -> bool:
        return a.x >= b.x and a.y <= b.y and (a.x, a.y) != (b.x, b.y)

    assert {one.label for one in found} == {
        one.label for one in points if not any(beats(other, one) for other in points)
    }
    assert [one.x for one in found] == sorted(one.x for one in found)


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=9))
def test_an_axis_has_room_for_every_value(values):
    for axis in (around(values, least=0.0), from_zero(max(values))):
        assert all(-1e-6 <= axis.place(value) <= 1 + 1e-6 for value in values)
        assert 2 <= len(axis.ticks) <= 12
        assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in axis.ticks)


# ---- the page itself


@pytest.fixture(scope="module")
def whole(measured):
    """A page with every section but that on speed."""
    model, batch, report = measured
    old = hf_sparse.measure(tiny("llama"), [batch])
    return report.to_html(model=model, before=old, beside={"a": old, "b": report + report})


def test_a_page_loads_and_runs_nothing(whole):
    page = Page(whole)
    assert not [one for one in page.root.all() if one.tag in ("script", "link", "img", "iframe", "object")]
    for one in page.root.all():
        assert not [name for name in one.attributes if name.startswith("on") or name in ("src", "xlink:href")]
        assert one.attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", whole)
    assert "default-src 'none'" in whole


def test_a_page_is_read_without_eyes(whole):
    page = Page(whole)
    assert page.find("html")[0].attributes["lang"] == "en"
    ids = [one.attributes["id"] for one in page.root.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    named = [
        one.attributes[name].split()
        for one in page.root.all()
        for name in ("aria-labelledby", "aria-describedby")
        if name in one.attributes
    ]
    links = [[one.attributes["href"].removeprefix("#")] for one in page.find("a")]
    assert {name for names in (*named, *links) for name in names} <= set(ids)
    tables = page.find("table")
    shown = charts(page)
    assert len(shown) == 6
    for chart in shown.values():
        assert chart.find("title")[0].text
        assert re.search(r"\d", chart.find("desc")[0].text)
    assert len([one for one in tables if "details" in one.inside]) >= len(shown)
    for table in tables:
        assert table.find("caption")[0].text
        assert {one.attributes["scope"] for one in table.find("th")} == {"col", "row"}
    others = [one for one in page.find("svg") if one not in shown.values()]
    assert all(one.attributes["aria-hidden"] == "true" for one in others)
    levels = [int(one.tag[1]) for one in page.root.all() if re.fullmatch("h[1-6]", one.tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_what_is_said_by_colour_is_said_by_shape_too():
    style = Path(report_page.__file__).with_name("style.css").read_text(encoding="utf-8")
    assert "rect.other { fill: var(--page)" in style
    assert "circle.other { fill: var(--page)" in style


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_and_marks_stand_out_from_the_page(scheme):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what a figure shows."""
    style = Path(report_page.__file__).with_name("style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", style.split("@media")[scheme]))
    assert len(colours) == 11

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    pairs = [
        ("ink", "page"),
        ("soft", "page"),
        ("link", "page"),
        ("ink", "card"),
        ("soft", "card"),
        ("ink", "note"),
    ]
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    assert min(contrast(one, "page") for one in ("main", "other", "faint", "note-edge")) >= 3


# ---- text from elsewhere


def hostile_page(write: str) -> str:
    report = made_up(name=f"{HOSTILE}{{}}")
    return getattr(report, write)(model_name=HOSTILE, data=HOSTILE, before=report, beside={HOSTILE: report})


def test_names_from_elsewhere_are_text_in_html():
    page = Page(hostile_page("to_html"))
    assert {one.tag for one in page.root.all()} == {
        one.tag for one in Page(made_up().to_html(before=made_up(), beside={"a": made_up()})).root.all()
    }
    shown = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"' & `x` | [a](http://b.c)"
    assert page.find("h1")[0].text.startswith(f"Activation sparsity of {shown}")
    assert page.find("title")[0].text.startswith(f"Activation sparsity of {shown}")
    rows = page.tables()["Sparsity by block"]
    assert [row[0].startswith(shown) for row in rows[1:4]] == [True] * 3
    text = hostile_page("to_html")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", text)
    text.encode("utf-8")


def test_names_from_elsewhere_are_text_in_markdown():
    text = hostile_page("to_markdown")
    assert not re.search(r"<|http:|www\.|@", text)
    widths: dict[int, set[int]] = {}
    block = 0
    for line in text.splitlines():
        block += not line.startswith("| ")
        if line.startswith("| "):
            widths.setdefault(block, set()).add(len(re.findall(r"(?<!\\)\|", line)))
    assert len(widths) == 4
    assert all(len(found) == 1 for found in widths.values())
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]


def test_markdown_has_the_tables_of_the_page(measured):
    model, _, report = measured
    tables = Page(report.to_html(model=model)).tables()
    text = report.to_markdown(model=model)
    for caption, rows in tables.items():
        assert f"{caption}:".replace("_", r"\_") in text
        for row in rows[2:]:
            cells = " | ".join("" if cell == "none" else cell for cell in row)
            assert cells.replace("_", r"\_") in text or row[0] == "Page written"


def test_what_can_be_left_out_is_in_a_table_beside_exact_zeros():
    found = tails()
    page = Page(made_up().to_html(cett=found))
    assert "Sparsity at a perplexity 1.5 % higher" in headings(page)
    rows = "Neurons that can be left out, by block"
    for layer in found.layers:
        row = page.row(rows, layer.name)
        assert row["can be left out"] == f"{layer.sparsity:.2%}"
        assert (row["exact zeros"], row["threshold"]) == (f"{layer.zeros:.2%}", f"{layer.threshold:.3g}")
    assert page.row(rows, "all blocks")["can be left out"] == "50.00%"
    assert "Neurons that can be left out by MLP block" in charts(page)
    assert "CETT-PPL-1.5 %" in made_up().to_markdown(cett=found)
    assert "perplexity 1.5 % higher" not in made_up().to_html()


# ---- refused


def test_reports_of_another_model_are_refused(measured):
    model, _, report = measured
    with pytest.raises(ValueError, match="before has 3 MLP blocks"):
        report.to_html(before=made_up())
    with pytest.raises(ValueError, match=r"model has no MLP block 'gpt_neox\.0'"):
        made_up(name="gpt_neox.{}").to_html(model=model)
    with pytest.raises(ValueError, match="cett is of another model"):
        made_up(name="gpt_neox.{}").to_markdown(cett=tails())
    with pytest.raises(ValueError, match="cett is of another model"):
        report.to_html(cett=tails(neurons=11))
    with pytest.raises(TypeError, match="colour"):
        report.to_markdown(colour="red")


# ---- the command


def test_the_command_writes_both_pages(tmp_path, capsys):
    text = tmp_path / "some text.txt"
    text.write_text("A neuron that is silent for a token need not be read. " * 40, encoding="utf-8")
    options = ["--text-file", str(text), "--max-tokens", "256", "--sequence-length", "64"]
    dense, folder = tmp_path / "dense.json", tmp_path / "relu"
    assert main(["measure", "tiny", *options, "--json", str(dense)]) == 0
    assert main(["patch", "tiny", "--output", str(folder)]) == 0
    html, markdown, own = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "own.json"
    pages = ["--html", str(html), "--markdown", str(markdown), "--json", str(own)]
    pages += ["--before", str(dense), "--beside", str(dense), "--metrics", "union"]
    assert main(["measure", str(folder), *options, *pages]) == 0
    report, page = hf_sparse.SparsityReport.from_json(own), Page(html.read_text(encoding="utf-8"))
    assert page.find("h1")[0].text == "Activation sparsity of relu"
    for layer in report.layers:
        assert page.row("Sparsity by block", layer.name)["sparsity"] == f"{layer.sparsity:.2%}"
    assert [row[0] for row in page.tables()["The reports of the plot"][1:]] == ["relu", "before", "dense"]
    facts = {row[0]: row[1] for row in page.tables()["The model, the text and the process"]}
    assert facts["Data"] == "the file some text.txt"
    assert str(tmp_path) not in html.read_text(encoding="utf-8") + markdown.read_text(encoding="utf-8")
    assert f"**{report.sparsity:.2%}**" in markdown.read_text(encoding="utf-8")
    assert main(["measure", "tiny", "--speed", "--html", str(html)]) == 2
    assert "MODEL is not patched" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--html", "nowhere/r.html"], "--html='nowhere/r.html': 'nowhere' is no folder."),
        (["--html", "."], "--html='.' is a folder; give a file."),
        (["--speed"], "--speed is for a page; give --html FILE or --markdown FILE as well."),
        (["--beside", "a.json"], "--beside is for a page;"),
        (["--before", "a.json"], "--before is for a page;"),
        (["--before", "a.json", "--html", "r.html"], "a.json"),
        (["--cett-ppl", "0"], "--cett-ppl=0 is no rise of perplexity in percent"),
        (["--cett-ppl", "nan"], "--cett-ppl=nan is no rise"),
        (["--beside", "a.json", "./a.json", "--html", "r.html"], "--beside has 'a.json' twice"),
    ],
)
def test_the_command_refuses_before_it_loads_anything(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert main(["measure", "./no-such-folder", *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_are_named_by_what_tells_them_apart():
    assert names_of([Path("a/report.json"), Path("b/report.json")]) == ["a/report", "b/report"]
    assert names_of([Path("runs/x.json"), Path("y.json")]) == ["x", "y"]
    assert names_of([]) == []
