"""Boxes and arrows as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from docs.pictures.svg import SANS, document, number

Point = tuple[float, float]
Edges = Mapping[tuple[str, str], str]
"""From, to, and the class that colours the arrow."""

STYLE = (
    f"text{{font:13px {SANS}}}.name{{font-weight:600}}.note{{font-size:11.5px}}"
    ".line{fill:none;stroke-width:1.8}.line.seldom{stroke-width:1;opacity:.5}"
    ".faint{stroke-dasharray:4 4}.middle{text-anchor:middle}"
)
_HALF, _TALL = 58, 18
"""Half the width and half the height of a state's box."""


def architecture(source: Mapping[str, Any]) -> str:
    """The picture that ``source`` describes: boxes with notes, arrows with labels."""
    body = [marker("dim")]
    for box in source["boxes"].values():
        body += _box(box)
    for arrow in source["arrows"]:
        body += _arrow(arrow)
    return document(source["width"], source["height"], source["title"], source["about"], STYLE, body)


def _box(box: Mapping[str, Any]) -> Iterable[str]:
    x, y, width, height = box["at"]
    notes = box.get("notes", ())
    group = box.get("group", False)
    yield f'<rect class="{"paper" if group else "panel"} s-edge" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'
    first = y + 22 if group else y + height / 2 + 5 - 8 * len(notes)
    middle = x + width / 2
    yield f'<text class="text name middle" x="{number(middle)}" y="{number(first)}">{escape(box["title"])}</text>'
    for row, note in enumerate(notes, 1):
        yield f'<text class="dim note middle" x="{number(middle)}" y="{number(first + 16 * row)}">{escape(note)}</text>'


def _arrow(arrow: Mapping[str, Any]) -> Iterable[str]:
    points = [(float(x), float(y)) for x, y in arrow["path"]]
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
    start = ' marker-start="url(#to-dim)"' if arrow.get("both") else ""
    faint = " faint" if arrow.get("faint") else ""
    yield f'<path class="line s-dim{faint}" d="{path}"{start} marker-end="url(#to-dim)"/>'
    if label := arrow.get("label"):
        (x0, y0), (x1, y1) = points[-2:] if len(points) == 2 else points[1:3]
        x, y, side = (x0 + x1) / 2, (y0 + y1) / 2 - 7, " middle"
        if x0 == x1:  # beside a line that goes down
            x, y, side = x0 + 9, (y0 + y1) / 2 + 4, ""
        yield f'<text class="dim note{side}" x="{number(x)}" y="{number(y)}">{escape(label)}</text>'


def states(source: Mapping[str, Any], edges: Edges, about: str) -> str:
    """Every edge as an arrow between the boxes of ``source["at"]``, the usual ones bold. KeyError: a state without a place."""
    at: Mapping[str, Sequence[float]] = source["at"]
    bends = {tuple(pair.split()): point for pair, point in source.get("bend", {}).items()}
    body = [marker(colour) for colour in sorted(set(edges.values()))]
    usual = {(start, end) for start, ends in source["usual"].items() for end in ends}
    for (start, end), colour in sorted(edges.items(), key=lambda edge: (edge[0] in usual, edge[0])):
        bold = "" if (start, end) in usual else " seldom"
        path = _between(at[start], at[end], bends.get((start, end)), aside=5 if (end, start) in edges else 0)
        body.append(f'<path class="line s-{colour}{bold}" d="{path}" marker-end="url(#to-{colour})"/>')
    for name in sorted({name for pair in edges for name in pair}):
        x, y = at[name]
        body.append(
            f'<rect class="panel s-edge" x="{x - _HALF}" y="{y - _TALL}" width="{2 * _HALF}" height="{2 * _TALL}" rx="9"/>'
            f'<text class="text name middle" x="{x}" y="{y + 5}">{escape(name)}</text>'
        )
    for row, (colour, words) in enumerate(source["legend"].items()):
        x, y = source["legend_at"][0], source["legend_at"][1] + 20 * row
        body.append(f'<path class="line s-{colour}" d="M{x} {y}H{x + 30}" marker-end="url(#to-{colour})"/>')
        body.append(f'<text class="dim note" x="{x + 40}" y="{y + 4}">{escape(words)}</text>')
    return document(source["width"], source["height"], source["title"], about, STYLE, body)


def _between(start: Sequence[float], end: Sequence[float], bend: Sequence[float] | None, aside: float) -> str:
    """A line from box to box; ``aside`` moves it out of the way of the one that comes back."""
    a, b = (float(start[0]), float(start[1])), (float(end[0]), float(end[1]))
    length = math.dist(a, b)
    off = (-(b[1] - a[1]) / length * aside, (b[0] - a[0]) / length * aside)
    via = (float(bend[0]), float(bend[1])) if bend else None
    first, last = _edge(a, via or b), _edge(b, via or a)
    first, last = (first[0] + off[0], first[1] + off[1]), (last[0] + off[0], last[1] + off[1])
    turn = f"Q{number(via[0])} {number(via[1])} " if via else "L"
    return f"M{number(first[0])} {number(first[1])}{turn}{number(last[0])} {number(last[1])}"


def _edge(centre: Point, towards: Point) -> Point:
    """Where a line from the middle of a box leaves it."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    share = min(_HALF / abs(dx) if dx else math.inf, _TALL / abs(dy) if dy else math.inf)
    return centre[0] + dx * share, centre[1] + dy * share


def marker(colour: str) -> str:
    return (
        f'<marker id="to-{colour}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7"'
        f' orient="auto-start-reverse"><path class="{colour}" d="M0 0L8 4L0 8z"/></marker>'
    )
