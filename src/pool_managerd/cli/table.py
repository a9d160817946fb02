"""The one table of the command line: columns with priorities, cut only with a mark, as wide as the terminal at most.

On a terminal the columns that matter least are left out first, then cells are cut (``…``) down to their column's least
width. In a pipe and with ``-o wide`` everything is shown whole.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pool_managerd.cli.output import as_typed, paint, plain, printable

_GAP = 2
_FEWEST_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class Column:
    """``rank`` 0 stays longest; ``wide``: only where there is no limit. ``least`` is the width a cell may be cut to,
    0 for never; ``middle`` keeps both ends of what is cut (names that differ at the end); ``lines``: a cell is broken into so
    many at most before it is cut."""

    head: str
    rank: int = 0
    least: int = 0
    middle: bool = False
    wide: bool = False
    lines: int = 1


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[Any]], *, empty: str, wide: bool = False, to: TextIO | None = None
) -> None:
    """Rows under their headings; ``empty`` when there are none. A cell may have several lines, one below the other. ``to``:
    elsewhere than to the standard output.
    """
    out = to or sys.stdout
    found = [[_lines(cell) for cell in row] for row in rows]
    if not found:
        out.write(empty + "\n")
        return
    room = None if wide or not out.isatty() else max(_FEWEST_COLUMNS, shutil.get_terminal_size().columns)
    natural = [max(map(width, (column.head, *(line for row in found for line in row[i])))) for i, column in enumerate(columns)]
    shown = widths(columns, natural, room)
    out.write(paint(_line(columns, {i: columns[i].head for i in shown}, shown), "1" if out is sys.stdout else "") + "\n")
    for row in found:
        for i in shown:
            row[i] = [part for line in row[i] for part in _broken(line, shown[i], columns[i].lines)]
        for number in range(max(len(row[i]) for i in shown)):
            cells = {i: row[i][number] if number < len(row[i]) else "" for i in shown}
            out.write(_line(columns, cells, shown) + "\n")


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Name and value, one a line; absent values are left out."""
    found = [(name, plain(value)) for name, value in pairs if value is not None]
    names = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        sys.stdout.write(f"{name:<{names}}  {wrapped(value, names + 2)}\n")


def write_lines(lines: Iterable[str]) -> None:
    """Each by itself, on a terminal broken between words; what goes on is indented by two more than its line."""
    for line in lines:
        text = printable(as_typed(line))
        indent = len(text) - len(text.lstrip(" ")) + 2
        sys.stdout.write(f"{text[:indent]}{wrapped(text[indent:], indent)}\n")


def widths(columns: Sequence[Column], natural: Sequence[int], room: int | None, gap: int = _GAP) -> dict[int, int]:
    """The width of each column that is shown, by its index. ``room`` None: all of them, whole."""
    if room is None:
        return dict(enumerate(natural))
    least = [min(full, column.least or full) for column, full in zip(columns, natural, strict=True)]
    kept = [i for i, column in enumerate(columns) if not column.wide]
    while len(kept) > 1 and sum(least[i] for i in kept) + gap * (len(kept) - 1) > room:
        kept.remove(max(kept, key=lambda i: (columns[i].rank, i)))
    found = {i: min(least[i], room) for i in kept}
    for _ in range(room - sum(found.values()) - gap * (len(kept) - 1)):  # what is left goes to the narrowest that want it
        wanting = [i for i in kept if found[i] < natural[i]]
        if not wanting:
            break
        found[min(wanting, key=lambda i: (found[i], columns[i].rank))] += 1
    return found


def cut(text: str, room: int, *, middle: bool = False) -> str:
    """``text`` in at most ``room`` columns, with … where something is missing."""
    if width(text) <= room:
        return text
    tail = (room - 1) // 2 if middle else 0
    end = _fitting(text[::-1], tail)[::-1]
    return f"{_fitting(text, room - 1 - tail)}…{end}"


def width(text: str) -> int:
    """How many columns of a terminal ``text`` takes: wide signs two, combining ones none."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def wrapped(text: str, indent: int) -> str:
    """``text`` behind ``indent`` columns that stand already: on a terminal broken between words, the rest indented as far.

    A word that is too long for a line is not broken: it can be copied.
    """
    room = shutil.get_terminal_size().columns - indent
    if not sys.stdout.isatty() or room < _FEWEST_COLUMNS or width(text) <= room:
        return text
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and width(lines[-1]) + 1 + width(word) > room:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return ("\n" + " " * indent).join(lines)


def _broken(text: str, room: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines, broken between words; the last one has the rest, however long."""
    lines = [text]
    while len(lines) < most and width(lines[-1]) > room and " " in (head := _fitting(lines[-1], room + 1)):
        head = head.rpartition(" ")[0]
        lines[-1:] = [head, lines[-1][len(head) + 1 :]]
    return lines


def _cells(sign: str) -> int:
    if unicodedata.combining(sign) or unicodedata.category(sign) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in ("W", "F") else 1


def _fitting(text: str, room: int) -> str:
    used, kept = 0, ""
    for sign in text:
        used += _cells(sign)
        if used > room:
            break
        kept += sign
    return kept


def _lines(cell: Any) -> list[str]:
    """The lines of a cell; a list gives them, everything else is one line."""
    return [plain(part) for part in cell] if isinstance(cell, list) else [plain(cell)]


def _line(columns: Sequence[Column], cells: dict[int, str], shown: dict[int, int]) -> str:
    parts = []
    for i, room in shown.items():
        text = cut(cells[i], room, middle=columns[i].middle)
        style = state_style(text) if columns[i].head == "STATE" else ""
        parts.append(paint(text, style) + " " * (room - width(text)))
    return (" " * _GAP).join(parts).rstrip()


def state_style(state: str) -> str:
    """Green and red alone: they can be read on dark and on light; everything else is as the terminal has it."""
    if state in ("ready", "succeeded", "ok"):
        return "32"
    return "31" if state in ("failed", "error", "critical") else ""
