"""Draws the figures of docs/concepts.md, as SVG, from the formulas that the page gives, and that of a result.

    PYTHONPATH=docs python -m website.figures

A test holds the committed files to what this draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from website.pages import ROOT

FOLDER = ROOT / "docs" / "figures"
# Readable on their own card, so that one file serves light and dark pages.
CARD, INK, FAINT, GRID = "#fbfbfd", "#24292f", "#6b7280", "#dfe3e8"
READ, SILENT, SECOND, THIRD = "#2f6fb3", "#e6e8ec", "#c4561e", "#3d8b54"
TOKENS = (1, 2, 4, 8, 16, 32, 64)


def gated(density: float) -> float:
    """Share of the bytes of a gated block that one token reads."""
    return (1 + 2 * density) / 3


def plain(density: float) -> float:
    """The same of a block without a gate."""
    return (1 + density) / 2


def needed(density: float, tokens: int) -> float:
    """Share of the neurons that at least one of so many independent tokens needs."""
    return 1 - (1 - density) ** tokens


def silent_neurons() -> str:
    """A gated block: rows of gate and up, columns of down, of eight neurons."""
    active = (False, True, False, False, True, False, True, False)
    row, width, top, left = 22, 170, 64, 24
    down = left + 2 * (width + 70)
    parts = []
    for number, on in enumerate(active):
        y = top + number * row
        color = READ if on else SILENT
        parts.append(_box(left, y, width, row - 4, READ))
        parts.append(_box(left + width + 70, y, width, row - 4, color))
        parts.append(_box(down + number * row, top, row - 4, 8 * row - 4, color))
        parts.append(_text(left + width + 35, y + 13, "a > 0" if on else "a = 0", INK if on else FAINT))
    titles = (("gate: all rows are read", left), ("up: rows of active neurons", left + width + 70))
    parts += [_text(x + width / 2, 44, title, INK) for title, x in titles]
    parts.append(_text(down + 4 * row, 44, "down: their columns", INK))
    foot = "a = act(gate(x)), one value per neuron. Blue is read; grey is not, 2/3 of each silent neuron."
    parts.append(_text(left, top + 8 * row + 26, foot, FAINT, "start"))
    return _svg(down + 8 * row + 24, top + 8 * row + 44, parts)


def bytes_and_tokens() -> str:
    """Bytes read by sparsity, and neurons that several tokens need."""
    sparsities = [index / 20 for index in range(21)]
    left = _Axes(62, 52, "sparsity of one token", "share of the block's bytes that is read")
    right = _Axes(442, 52, "independent tokens in one call", "share of neurons that are needed, by sparsity")
    parts = left.frame([(s, f"{s:.0%}") for s in (0, 0.25, 0.5, 0.75, 1)])
    parts += left.line([(s, plain(1 - s)) for s in sparsities], SECOND, "plain: (1 + p) / 2", 0.02, 0.57)
    parts += left.line([(s, gated(1 - s)) for s in sparsities], READ, "gated: (1 + 2p) / 3", 0.02, 0.41)
    last = len(TOKENS) - 1
    parts += right.frame([(index / last, str(count)) for index, count in enumerate(TOKENS)])
    for share, color, x, y in ((0.5, SECOND, 0.0, 0.84), (0.8, THIRD, 0.1, 0.55), (0.9, READ, 0.45, 0.35)):
        points = [(index / last, needed(1 - share, count)) for index, count in enumerate(TOKENS)]
        parts += right.line(points, color, f"{share:.0%}", x, y, dots=True)
    return _svg(780, 350, parts)


def against_llama_cpp() -> str:
    """Tokens per second of every program, for the two models of benchmarks/peers.py."""
    left, row, width = 240, 24, 300
    parts: list[str] = []
    y = 34.0
    for name, title in (("peers", "Shape of Llama-3.2-1B"), ("peers_smollm2", "SmolLM2-135M")):
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        most = max(one["tokens_per_s"] for one in rows)
        parts.append(_text(24, y, f"{title}, tokens per second", INK, "start"))
        for one in rows:
            y += row
            program, long = one["model"].replace("bfloat16", "bf16"), width * one["tokens_per_s"] / most
            color = SECOND if program.startswith("llama.cpp") else FAINT if program == "stock" else READ
            told = f"{one['tokens_per_s']:.1f}   {one['to_llama_cpp']:.2f}x"
            parts.append(_text(left - 10, y, "transformers" if program == "stock" else program, INK, "end"))
            parts.append(_box(left, y - 13, round(long, 1), row - 7, color))
            parts.append(_text(left + round(long, 1) + 8, y, told, INK, "start"))
        y += 2 * row
    foot = "The factor is to llama.cpp in bf16; about nine tenths of neurons are silent in the blue rows."
    parts.append(_text(24, y - 12, foot, FAINT, "start"))
    return _svg(660, y + 4, parts)


class _Axes:
    """A square from 0 to 1 in both directions, at a place of the picture."""

    WIDTH, HEIGHT = 300, 230

    def __init__(self, x: float, y: float, below: str, above: str) -> None:
        self.x, self.y, self.below, self.above = x, y, below, above

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + x * self.WIDTH, self.y + (1 - y) * self.HEIGHT

    def frame(self, ticks: Iterable[tuple[float, str]]) -> list[str]:
        parts = [_text(self.x, self.y - 18, self.above, INK, "start")]
        for share in (0, 0.25, 0.5, 0.75, 1):
            (x0, y), (x1, _) = self.at(0, share), self.at(1, share)
            parts.append(f'<line x1="{x0:g}" y1="{y:g}" x2="{x1:g}" y2="{y:g}" stroke="{GRID}"/>')
            parts.append(_text(x0 - 8, y + 4, f"{share:g}", FAINT, "end"))
        parts += [_text(self.at(x, 0)[0], self.at(0, 0)[1] + 20, label, FAINT) for x, label in ticks]
        parts.append(_text(self.x + self.WIDTH / 2, self.y + self.HEIGHT + 44, self.below, INK))
        return parts

    def line(
        self,
        points: list[tuple[float, float]],
        color: str,
        label: str,
        x: float,
        y: float,
        *,
        dots: bool = False,
    ) -> list[str]:
        places = [self.at(*point) for point in points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>']
        if dots:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{color}"/>' for px, py in places]
        return [*parts, _text(*self.at(x, y), label, color, "start")]


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{color}"/>'


def _text(x: float, y: float, text: str, color: str, anchor: str = "middle") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}">{escaped}</text>'


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    card = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{CARD}"/>'
    return "\n".join([head, card, *parts, "</svg>"]) + "\n"


FIGURES: dict[str, Callable[[], str]] = {
    "silent_neurons.svg": silent_neurons,
    "bytes_and_tokens.svg": bytes_and_tokens,
    "against_llama_cpp.svg": against_llama_cpp,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
