"""The packages as they import each other, drawn from the source: who stands higher imports who stands lower, never back."""

from __future__ import annotations

from collections import defaultdict
from xml.sax.saxutils import escape

from docs.pictures.diagram import STYLE, marker
from docs.pictures.svg import document, number

from tests.imports import circle, direct, levels, packages

WIDTH, ROW, BOX = 880, 74, (140, 34)
COLOURS = {"core": "green", "supervision": "blue", "wiring": "magenta", "testing": "dim"}
ADAPTERS = ("host", "models", "engines", "runtime", "store")


def picture() -> str:
    """Raises ValueError when the imports go in a circle."""
    graph = packages()
    if found := circle(graph):
        raise ValueError(f"the packages import each other in a circle: {' -> '.join(found)}")
    rows: defaultdict[int, list[str]] = defaultdict(list)
    for name, level in levels(graph).items():
        rows[level].append(name)
    at: dict[str, tuple[float, float]] = {}
    for level, names in rows.items():
        for place, name in enumerate(sorted(names)):
            at[name] = WIDTH * (place + 1) / (len(names) + 1), 40 + ROW * (max(rows) - level)
    arrows = sorted(direct(graph))
    colours = {name: _colour(name) for name in at}
    body = [marker(colour) for colour in sorted({colours[target] for _, target in arrows})]
    for start, end in arrows:
        (x0, y0), (x1, y1) = at[start], at[end]
        line = f"M{number(x0)} {number(y0 + BOX[1] / 2)}L{number(x1)} {number(y1 - BOX[1] / 2)}"
        body.append(f'<path class="line s-{colours[end]}" d="{line}" marker-end="url(#to-{colours[end]})"/>')
    for name, (x, y) in sorted(at.items()):
        left, top = number(x - BOX[0] / 2), number(y - BOX[1] / 2)
        body.append(f'<rect class="panel s-edge" x="{left}" y="{top}" width="{BOX[0]}" height="{BOX[1]}" rx="8"/>')
        label = escape(name.replace(".", "/"))
        body.append(f'<text class="text name middle" x="{number(x)}" y="{number(y + 5)}">{label}</text>')
    about = "; ".join(f"{start} imports {end}" for start, end in arrows)
    return document(WIDTH, 80 + ROW * max(rows), "Which package imports which", about, STYLE, body)


def _colour(name: str) -> str:
    top = name.partition(".")[0]
    return COLOURS.get(top, "cyan" if top in ADAPTERS else "dim")
