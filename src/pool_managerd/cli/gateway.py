"""``gateway``: the front door, run by hand; `serve` runs it where `gateway.bind` is set. ``keys``: who may come in."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pool_managerd.cli.client import DEFAULT_CONFIG, Daemon, find_daemon
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, Url, seconds
from pool_managerd.cli.output import Format, show
from pool_managerd.cli.table import Column, table

if TYPE_CHECKING:
    from pool_managerd.config import Config
    from pool_managerd.gateway.keys import KeyFile
    from pool_managerd.gateway.node_link import NodeLink

Bind = Annotated[
    str | None, typer.Option("--bind", metavar="HOST:PORT", help="Where it listens. [127.0.0.1:8088]", show_default=False)
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, max=64, help="How many processes it is. [1]", show_default=False)
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="A model that it may ask for; several times, for several.")]
Expires = Annotated[str | None, typer.Option("--expires", metavar="30d", help="How long it holds.", show_default=False)]
Concurrency = Annotated[int | None, typer.Option("--concurrency", min=1, help="Requests at once.", show_default=False)]
Tokens = Annotated[
    int | None, typer.Option("--daily-tokens", min=1, help="Of prompts and answers, for a day (UTC).", show_default=False)
]
DEFAULT_BIND = "127.0.0.1:8088"


def gateway(config: ConfigFile = None, url: Url = None, bind: Bind = None, workers: Workers = None) -> None:
    """Serve models by name on one port (OpenAI, Anthropic).

    It is a client of the daemon: a restart of either ends no stream that the other has to do with.
    """
    import asyncio

    from pool_managerd.config.parse import read_bounded
    from pool_managerd.gateway import process
    from pool_managerd.gateway import workers as several
    from pool_managerd.httpd.server import listen_together

    path, loaded = _loaded(config, bind, workers)
    where = loaded.gateway.bind or DEFAULT_BIND
    options, node = process.options_of(loaded, where), find_daemon(url, path, os.environ)
    listeners = listen_together(where, loaded.gateway.workers)
    with _telemetry(loaded):
        if len(listeners) == 1:
            asyncio.run(process.serve(_link(node, loaded), listeners[0], options))
            return
        words = ["--url", node.url, *(() if path is None else ("--config", str(path)))]
        command = (sys.executable, "-P", "-m", "pool_managerd.cli", "gateway-worker", *words, "--bind", where)
        code = asyncio.run(several.Workers(command, "" if path is None else read_bounded(path), listeners).run())
    if code:
        raise typer.Exit(code)


def gateway_worker(one: Annotated[str, typer.Argument()], config: ConfigFile = None, url: Url = None, bind: Bind = None) -> None:
    """One process of a gateway that has several: that begins it."""
    import asyncio
    import socket

    from pool_managerd.config.load import load_config, load_text
    from pool_managerd.gateway import process
    from pool_managerd.gateway.workers import Worker, read_orders

    worker = Worker.from_argument(one)
    orders, text = sys.stdin.fileno(), read_orders(sys.stdin.fileno())
    flags = {"gateway.bind": bind, "gateway.workers": worker.of}
    loaded = (
        load_config(None, env=os.environ, overrides=flags) if config is None
        else load_text(text, config, env=os.environ, overrides=flags)
    )  # fmt: skip
    options = process.options_of(loaded, loaded.gateway.bind or DEFAULT_BIND)
    link = _link(find_daemon(url, None, os.environ), loaded)
    with _telemetry(loaded):
        asyncio.run(process.serve(link, socket.socket(fileno=worker.clients), options, worker.common(), orders))


def _link(node: Daemon, loaded: Config) -> NodeLink:
    from pool_managerd.gateway.node_link import NodeLink

    token_file = loaded.auth.token_file
    return NodeLink(node.url, lambda: node.token or _first_line(token_file))


@contextmanager
def _telemetry(loaded: Config) -> Iterator[None]:
    """Its log, and its traces where they are wanted."""
    from pool_managerd._version import __version__
    from pool_managerd.telemetry.logs import LogOptions, configure_logging
    from pool_managerd.telemetry.tracing import exported

    told = loaded.telemetry
    logs = configure_logging(LogOptions(__version__, told.log_format, told.labels, told.log_level))
    try:
        with exported(os.environ, "pool-managerd-gateway", logs, told.labels):
            yield
    finally:
        logs.close()


def keys_add(
    name: Name, model: Models = None, expires: Expires = None, concurrency: Concurrency = None, daily_tokens: Tokens = None,
    config: ConfigFile = None,
) -> None:  # fmt: skip
    """Make a key for clients of the gateway. It is printed once; only its hash is kept."""
    lasts = seconds(expires, "--expires")
    until = None if lasts is None else int(time.time() + lasts)
    path, loaded = _loaded(config)
    names = {name for pool in loaded.pools for name in (pool.id, pool.served_name, *pool.other_names)}
    for unknown in [one for one in model or () if one not in names]:
        typer.echo(f"no pool of the configuration is called {unknown!r}: the key is for it all the same", err=True)
    typer.echo(_keys(path, loaded).add(name, tuple(model or ()), until, concurrency, daily_tokens))


def keys_ls(config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """List the keys."""
    from pool_managerd.gateway.budgets import Budgets, beside

    keys = _keys(*_loaded(config))
    budgets = Budgets(beside(keys.place))
    rows = [
        {
            "name": key.name, "models": list(key.models), "expires_at": key.expires_at, "concurrency": key.concurrency,
            "daily_tokens": key.daily_tokens, "used_today": budgets.used(key.name), "created_at": key.created_at,
        }
        for key in keys.all()
    ]  # fmt: skip
    columns = (
        Column("NAME", 0, least=8), Column("MODELS", 1, least=8), Column("EXPIRES", 2), Column("AT ONCE", 3),
        Column("TOKENS TODAY", 4),
    )  # fmt: skip

    def cells(row: dict[str, object]) -> tuple[object, ...]:
        until = row["expires_at"]
        shown = time.strftime("%Y-%m-%d %H:%M", time.localtime(until)) if isinstance(until, int) else None
        models = row["models"]
        listed = ", ".join(models) if isinstance(models, list) and models else "all"
        return row["name"], listed, shown, row["concurrency"], _used(row)

    show(rows, output, lambda found: table(columns, map(cells, found), empty="there are no keys", wide=output is Format.WIDE))


def _used(row: dict[str, object]) -> str | None:
    """Of how many, where there is a limit."""
    most, used = row["daily_tokens"], row["used_today"]
    return f"{used:,}" + (f" of {most:,}" if most is not None else "") if used or most is not None else None


def keys_rm(name: Name, config: ConfigFile = None) -> None:
    """Remove a key: requests that come with it are refused within a second."""
    _keys(*_loaded(config)).remove(name)
    typer.echo(f"key {name} is removed")


def _keys(path: Path | None, loaded: Config) -> KeyFile:
    from pool_managerd.gateway.keys import key_file

    found = key_file(loaded.base_dir, loaded.gateway.keys_file)
    if found is None:
        raise CommandFailed(
            f"cannot tell where the keys are: {path or 'the configuration'} has no gateway.keys_file", USAGE,
            hint="write `gateway: {keys_file: keys.json}` into it",
        )  # fmt: skip
    return found


def _loaded(config: Path | None, bind: str | None = None, workers: int | None = None) -> tuple[Path | None, Config]:
    from pool_managerd.config.load import load_config

    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    return path, load_config(path, env=os.environ, overrides={"gateway.bind": bind, "gateway.workers": workers})


def _first_line(path: Path | None) -> str | None:
    """Of the token's file, as it is now."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return file.read(4096).partition(b"\n")[0].strip().decode("ascii", "replace") or None
    except OSError:
        return None
