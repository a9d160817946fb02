"""How answers are shown: JSON for machines, tables for people, errors on stderr."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PIPE_WIDTH = 240
_LAST_COLUMNS = 24


class Format(enum.StrEnum):
    """Of a command's output."""

    TABLE = "table"
    JSON = "json"


def show(value: Any, output: Format, table: Callable[[Any], None]) -> None:
    """``value`` as JSON, or through ``table``."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    else:
        table(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Rows under their headings; ``empty`` when there are none. On a narrow terminal the columns on the right give way."""
    from rich.table import Table
    from rich.text import Text

    found = [[Text(plain(cell)) for cell in row] for row in rows]
    if not found:
        sys.stdout.write(empty + "\n")
        return
    console = _console()
    widths = [max(len(name), *(row[index].cell_len for row in found)) for index, name in enumerate(columns)]
    kept = _fitting(widths, console.width) if sys.stdout.isatty() else len(columns)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name, width in zip(columns[: kept - 1], widths, strict=False):
        grid.add_column(name, no_wrap=True, min_width=width)
    grid.add_column(columns[kept - 1])
    for row in found:
        grid.add_row(*row[:kept])
    console.print(grid)


def _fitting(widths: Sequence[int], room: int) -> int:
    """How many columns can be shown whole, and the next one as well where there is enough room for it to be wrapped."""
    for index, width in enumerate(widths):
        if width > room:
            return max(1, index + (room >= _LAST_COLUMNS))
        room -= width + 2  # what stands between two columns
    return len(widths)


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Name and value, one a line; absent values are left out."""
    found = [(name, plain(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def error(message: str, hint: str | None = None) -> None:
    """On stderr; what comes from elsewhere cannot steer the terminal. A hint that the message holds is not repeated."""
    sys.stderr.write(f"{printable(message)}\n")
    if hint and hint not in message:
        sys.stderr.write(f"hint: {printable(hint)}\n")


def plain(value: Any) -> str:
    """One cell: nothing for None, yes and no for truths."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return printable(str(value)).replace("\n", " ")


def printable(text: str) -> str:
    """``text`` without control characters other than the line feed and the tab."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def span(ms: int) -> str:
    """How long, in the unit that tells it best: ``42 s``, ``5 min``, ``3 h``."""
    seconds = ms / 1000
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def moment(ts_ms: Any) -> str | None:
    """A unix time in ms as local time."""
    if not isinstance(ts_ms, (int, float)):
        return None
    from datetime import datetime

    return datetime.fromtimestamp(ts_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=not sys.stdout.isatty())
