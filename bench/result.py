"""One line of the table, and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """``ours`` and ``theirs`` are in ``unit``; ``theirs`` is what ``other`` got in the same run. ``reached`` None: no goal."""

    what: str
    unit: str = ""
    ours: float | None = None
    other: str = ""
    theirs: float | None = None
    goal: str = ""
    reached: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or not self.theirs else self.ours / self.theirs

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


class NotInstalledError(Exception):
    """A row needs a program or package that this machine lacks; the text says which."""


def not_measured(what: str, reason: str) -> Row:
    return Row(what, note=f"not measured: {reason}")


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank: a value that was really measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def show(rows: Sequence[Row]) -> None:
    table = Table(title="pool-managerd, measured", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("ours", justify="right", no_wrap=True)
    for name in ("the other, in the same run", "ratio", "goal", "reached", "note"):
        table.add_column(name, overflow="fold")
    for row in rows:
        theirs = f"{row.other} {_number(row.theirs)}".strip()
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, f"{_number(row.ours)} {row.unit}".strip(), theirs, ratio, row.goal, _said(row.reached), row.note)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _said(reached: bool | None) -> str:
    return "" if reached is None else "yes" if reached else "NO"
