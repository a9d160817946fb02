"""Lines of cells within a width, none of which is ever wider; and what of several lists fits on a screen. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pool_managerd.cli.picture import Line
from pool_managerd.cli.table import Column, cut, width, widths

_GAP = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """``text`` in a style, or what ``draw`` makes of the width that is left, which wants ``wants`` columns."""

    text: str = ""
    style: str = ""
    right: bool = False
    draw: Callable[[int], Sequence[tuple[str, str]]] | None = None
    wants: int = 0


def grid(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], room: int) -> list[Line]:
    """Each row as a line of at most ``room`` columns. Columns of a high rank give way first."""
    natural = [
        max([width(row[i].text) if row[i].draw is None else row[i].wants for row in rows], default=0) for i in range(len(columns))
    ]
    wanted = [i for i, full in enumerate(natural) if full]
    if not wanted:
        return [Line(()) for _ in rows]
    found = widths([columns[i] for i in wanted], [natural[i] for i in wanted], room, _GAP)
    shown = {wanted[i]: size for i, size in found.items()}
    return [_line(row, columns, shown) for row in rows]


def fitted(line: Line, room: int) -> Line:
    """At most ``room`` columns of it, with a … where something is missing."""
    if width(str(line)) <= room:
        return line
    spans, left = [], room
    for text, style in line.spans:
        part = text if width(text) < left else cut(text, left)
        spans.append((part, style))
        left -= width(part)
        if left <= 0 or part != text:
            break
    return Line(tuple(spans))


def shares(wants: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """How many of ``room`` lines each list gets: first the least of each, those in front before the others, then what is left
    one by one.
    """
    given = [0] * len(wants)
    for i, (want, most) in enumerate(zip(wants, least, strict=True)):
        given[i] = min(want, most, room - sum(given))
    while (left := room - sum(given)) > 0:
        hungry = [i for i, want in enumerate(wants) if given[i] < want][:left]
        if not hungry:
            break
        for i in hungry:
            given[i] += 1
    return given


def shortened(lines: Sequence[Line], room: int, heads: int, what: str) -> list[Line]:
    """``lines``, of which the first ``heads`` are no rows; rows that do not fit are counted."""
    if len(lines) <= room:
        return list(lines)
    if room <= heads:
        return list(lines[:room])
    shown = room - 1
    left = len(lines) - shown
    return [*lines[:shown], Line(((f"… and {left} more {what}{'s' * (left != 1)}", ""),))]


def _line(row: Sequence[Cell], columns: Sequence[Column], shown: dict[int, int]) -> Line:
    spans: list[tuple[str, str]] = []
    for i, room in shown.items():
        spans.append((" " * _GAP if spans else "", ""))
        cell = row[i]
        if cell.draw is not None:
            spans.extend(cell.draw(room))
            continue
        text = cut(cell.text, room, middle=columns[i].middle)
        padding = (" " * (room - width(text)), "")
        spans.extend((padding, (text, cell.style)) if cell.right else ((text, cell.style), padding))
    return Line(tuple(span for span in spans if span[0]))


def texts(values: Iterable[str], style: str = "", *, right: frozenset[int] = frozenset()) -> list[Cell]:
    """A row of plain cells."""
    return [Cell(value, style, right=i in right) for i, value in enumerate(values)]
