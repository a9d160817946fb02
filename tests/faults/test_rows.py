"""The list of rows is complete: each has a test that is named by it, or says why it has none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
_ROW = re.compile(r"^\| ([A-J]\d+) \| (.+?) \| (.+?) \|$", re.M)
_TEST = re.compile(r"^(?:async )?def test_([A-J]\d+)_", re.M)
FIRST_AND_LAST = {"A": 17, "B": 27, "C": 11, "D": 15, "E": 17, "F": 11, "G": 7, "H": 15, "I": 13, "J": 11}
"""Each family's rows have the odd numbers up to this one."""


def gaps(rows: dict[str, str], tested: Iterable[str]) -> list[str]:
    """What is missing. ``rows``: what the table says of each id."""
    expected = {f"{family}{number}" for family, last in FIRST_AND_LAST.items() for number in range(1, last + 1, 2)}
    found = [f"{row} is not in the table" for row in sorted(expected - rows.keys())]
    found += [f"{row} has a test and is not in the table" for row in sorted(set(tested) - rows.keys())]
    for row, said in rows.items():
        if said.startswith("test") and row not in tested:
            found.append(f"{row} is said to have a test and has none")
        if not said.startswith("test") and (row in tested or not re.match(r"no test[^:]*: .{10,}", said)):
            found.append(f"{row} has no test and no reason, or a reason and a test")
    return found


def test_every_row_has_a_test_or_a_reason() -> None:
    rows = {row: said for row, _, said in _ROW.findall((HERE / "README.md").read_text("utf-8"))}
    tested = {row for path in HERE.glob("test_*.py") for row in _TEST.findall(path.read_text("utf-8"))}
    assert gaps(rows, tested) == []


def test_a_gap_would_be_found() -> None:
    rows = {f"{family}{number}": "test" for family, last in FIRST_AND_LAST.items() for number in range(1, last + 1, 2)}
    tested = set(rows)
    assert gaps(rows, tested) == []
    assert gaps(rows, tested - {"B3"}) == ["B3 is said to have a test and has none"]
    assert gaps({row: said for row, said in rows.items() if row != "J1"}, tested - {"J1"}) == ["J1 is not in the table"]
    assert len(gaps({**rows, "C1": "no test:"}, tested - {"C1"})) == 1
    assert len(gaps({**rows, "C1": "no test: it is not there yet"}, tested)) == 1
    assert gaps(rows, {*tested, "Z9"}) == ["Z9 has a test and is not in the table"]
