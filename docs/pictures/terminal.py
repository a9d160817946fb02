"""A transcript as a picture of a terminal. Lines with a time ("  ✓   0.05 s  …") appear when they were printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.sax.saxutils import escape

from docs.pictures.svg import MONO, document, number

COLUMN, LINE, PAD, BAR = 7.5, 19, 16, 26
STEP = re.compile(r"^  ([·✓!✗])( +([\d.]+) s)  (.*)$")
_LEGEND = re.compile(r"^  ([A-Z\d=.?])(  .*)$")
_GPU = re.compile(r"^(GPU \d+)(  .*?  )(ok)(  .*)$")
_MARKS = {"·": "dim", "✓": "green", "!": "yellow", "✗": "red"}
_POOLS = ("cyan", "yellow", "blue", "green")
Span = tuple[str, str]
Shown = tuple[str, float]
"""A line, and the second at which it appears."""


def spans(line: str) -> list[Span]:
    """Stretches of a line with the class that colours them."""
    if line.startswith("$ "):
        return [("$ ", "green"), (line[2:], "text bold")]
    if step := STEP.match(line):
        return [("  ", "text"), (step[1], _MARKS[step[1]]), (step[2], "dim"), ("  ", "dim"), (step[4], "text")]
    if gpu := _GPU.match(line):
        return [(gpu[1], "text bold"), (gpu[2], "text"), (gpu[3], "green"), (gpu[4], "dim")]
    if line.startswith("  [") and line.endswith("]"):
        return [("  [", "dim"), *((part[0], _letter(part[0][0])) for part in re.finditer(r"(.)\1*", line[3:-1])), ("]", "dim")]
    if legend := _LEGEND.match(line):
        return [("  ", "text"), (legend[1], _letter(legend[1])), (legend[2], "text")]
    if line == "These GPUs are simulated.":
        return [(line, "yellow")]
    return [(line, "text bold" if line[:1].strip() else "text")]


def _letter(letter: str) -> str:
    if letter.isalpha():
        return _POOLS[(ord(letter.upper()) - ord("A")) % 4] + (" faint" if letter.islower() else "")
    return "magenta" if letter.isdigit() else "dim"


def timed(lines: list[str], slower: float) -> list[Shown]:
    """When each line appears: at its own time, ``slower`` times as slow, else with the next line that has one."""
    shown: list[Shown] = []
    at = 0.0
    for line in reversed(lines):
        if step := STEP.match(line):
            at = float(step[3]) * slower
        elif line.startswith("$ "):
            at = 0.0
        elif not shown:
            at = max((float(step[3]) for step in map(STEP.match, lines) if step), default=0.0) * slower
        shown.append((line, at))
    return shown[::-1]


def picture(lines: list[Shown], title: str, about: str) -> str:
    """The terminal with ``lines``; it stands still where motion is not wanted, and where nothing animates it."""
    columns = max(len(line) for line, _ in lines)
    width = round(columns * COLUMN + 2 * PAD)
    height = BAR + LINE * len(lines) + 2 * PAD - 8
    moments = sorted({at for _, at in lines if at})
    style = f"text{{font:12.5px {MONO};white-space:pre}}.bold{{font-weight:600}}.faint{{opacity:.75}}"
    if moments:
        style += "@keyframes come{from{opacity:0}to{opacity:1}}.at{animation:come .15s backwards}"
        style += "".join(f".m{index}{{animation-delay:{number(1 + at)}s}}" for index, at in enumerate(moments))
        style += "@media (prefers-reduced-motion:reduce){.at{animation:none}}"
    body = [f'<path class="s-edge" d="M1 {BAR}H{width - 1}"/>']
    body += [f'<circle class="edge" cx="{PAD + 3 + 16 * dot}" cy="13.5" r="4.5"/>' for dot in range(3)]
    for row, (line, at) in enumerate(lines):
        group = f'<g class="at m{moments.index(at)}">' if at else "<g>"
        if line.strip():
            body.append(group + "".join(_texts(line, BAR + PAD + LINE * row + 10)) + "</g>")
    return document(width, height, title, about, style, body)


def _texts(line: str, y: float) -> Iterator[str]:
    """Each stretch stands at its column and is as wide as its letters, so that columns meet in every font."""
    column = 0
    for text, name in spans(line):
        if inner := text.strip(" "):
            x = PAD + (column + len(text) - len(text.lstrip(" "))) * COLUMN
            yield (
                f'<text class="{name}" x="{number(x)}" y="{number(y)}" textLength="{number(len(inner) * COLUMN)}">'
                f"{escape(inner)}</text>"
            )
        column += len(text)
