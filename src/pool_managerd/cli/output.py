"""How answers are shown: JSON for machines, tables for people, errors on stderr."""

from __future__ import annotations

import enum
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
# What can be read on dark and on light: yellow, cyan and blue vanish on one of them, dim on both.
SGR = {"bold": "1", "red": "31", "bold red": "1;31", "green": "32", "bold green": "1;32", "magenta": "35", "yellow": "1"}
_NAME = "pool-managerd"
_COMMAND = re.compile(r"(?<!runpip )(?<![\w./-])pool-managerd(?= [a-z])")


class Format(enum.StrEnum):
    """Of a command's output."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


def show(value: Any, output: Format, table: Callable[[Any], None]) -> None:
    """``value`` as JSON, or through ``table``."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    else:
        table(value)


def error(message: str, hint: str | None = None) -> None:
    """On stderr; what comes from elsewhere cannot steer the terminal. A hint that the message holds is not repeated."""
    sys.stdout.flush()  # what was printed before it stands before it
    sys.stderr.write(f"{printable(as_typed(message))}\n")
    if hint and hint not in message:
        sys.stderr.write(f"hint: {printable(as_typed(hint))}\n")


def as_typed(text: str) -> str:
    """``text`` with every ``pool-managerd COMMAND`` in it as it works here: bare when that is what PATH finds."""
    return _COMMAND.sub(lambda _: program(), text) if "pool-managerd " in text else text


def program() -> str:
    """This program as a person can type it: its bare name when PATH finds it, else the path that it was called by."""
    called = Path(sys.argv[0])
    if called.name != _NAME:  # python -m pool_managerd.cli, a test
        beside = Path(sys.executable).with_name(_NAME)
        called = beside if beside.is_file() else Path(_NAME)
    found = shutil.which(_NAME)
    if found is not None and Path(found).resolve() == called.resolve():
        return _NAME
    if not called.is_file():
        return _NAME
    return from_here(Path(os.path.abspath(called)))  # noqa: PTH100 - a venv's links are not followed


def from_here(path: Path) -> str:
    """``path`` as a person would type it here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) and here != Path("/") else path))


def plain(value: Any) -> str:
    """One cell: nothing for None, yes and no for truths."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return printable(str(value)).replace("\n", " ").replace("\t", " ")


def paint(text: str, style: str) -> str:
    """``text`` in an SGR style, on a terminal that may have it (NO_COLOR, TERM=dumb)."""
    if not style or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def printable(text: str) -> str:
    """``text`` without control characters other than the line feed and the tab."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def span(ms: int) -> str:
    """How long, in the unit that tells it best: ``42 s``, ``5 min``, ``3 h``."""
    seconds = ms / 1000
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def moment(ts_ms: Any, *, short: bool = False) -> str | None:
    """A unix time in ms as local time; ``short``: without the day when that is today."""
    if not isinstance(ts_ms, (int, float)):
        return None
    from datetime import datetime

    when = datetime.fromtimestamp(ts_ms / 1000).astimezone()
    today = short and when.date() == datetime.now().astimezone().date()
    return when.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")
