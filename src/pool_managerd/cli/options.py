"""Options and arguments that many commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pool_managerd.cli import completion
from pool_managerd.cli.client import Daemon, find_daemon
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.output import Format

Url = Annotated[str | None, typer.Option("--url", help="The daemon's address. [POOL_MANAGERD_URL]", show_default=False)]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file: YAML or TOML.", show_default=False)]
Output = Annotated[Format, typer.Option("--output", "-o", help="table, wide (nothing left out or cut) or json.")]
PoolId = Annotated[str, typer.Argument(metavar="ID", help="The pool's id.", autocompletion=completion.pool_ids)]
OptionalPoolId = Annotated[
    str | None,
    typer.Argument(
        metavar="[ID]", help="The pool's id; all pools when absent.", show_default=False, autocompletion=completion.pool_ids
    ),
]
PoolIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="Ids of pools.", show_default=False, autocompletion=completion.pool_ids),
]
All = Annotated[bool, typer.Option("--all", help="All pools that the daemon knows, instead of IDs.")]


def daemon(url: str | None, config: Path | None) -> Daemon:
    """The daemon that a command talks to."""
    return find_daemon(url, config, os.environ)


def chosen(node: Daemon, ids: list[str] | None, every: bool, *, default_all: bool = False) -> list[str]:
    """The pools that a command means, each once, in the order given. Raises CommandFailed (2) for none, or for both ways."""
    if ids and every:
        raise CommandFailed("cannot use IDs and --all together", USAGE, hint="leave one of the two out")
    if ids:
        return list(dict.fromkeys(ids))
    if not every and not default_all:
        raise CommandFailed("cannot tell which pool is meant: no ID was given", USAGE, hint="name pools, or write --all")
    return [pool["pool_id"] for pool in node.get("pools")]


def seconds(text: str | None, name: str, hint: str = "write 30s, 10m, 2h or 1d") -> float | None:
    """``10m`` as seconds; a bare number means seconds. Raises CommandFailed (2)."""
    if text is None:
        return None
    number, unit = (text[:-2], "ms") if text.endswith("ms") else (text[:-1], text[-1:]) if text[-1:].isalpha() else (text, "s")
    factor = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}.get(unit)
    if factor is None or len(number) > 12 or not number.replace(".", "", 1).isdecimal() or not number.isascii():
        raise CommandFailed(f"cannot use {name} {text[:40]!r}: it is no length of time", USAGE, hint=hint)
    return float(number) * factor
