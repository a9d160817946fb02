"""Options that many commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pool_managerd.cli.client import Daemon, find_daemon
from pool_managerd.cli.output import Format

Url = Annotated[str | None, typer.Option("--url", help="The daemon's address. [POOL_MANAGERD_URL]", show_default=False)]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file: YAML or TOML.", show_default=False)]
Output = Annotated[Format, typer.Option("--output", "-o", help="table or json.")]
PoolId = Annotated[str, typer.Argument(metavar="ID", help="The pool's id.")]
OptionalPoolId = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="The pool's id; all pools when absent.", show_default=False)
]


def daemon(url: str | None, config: Path | None) -> Daemon:
    """The daemon that a command talks to."""
    return find_daemon(url, config, os.environ)
