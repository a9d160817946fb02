"""``gateway``: the front door, run by hand; `serve` runs it where `gateway.bind` is set."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pool_managerd.cli.client import DEFAULT_CONFIG, find_daemon
from pool_managerd.cli.options import ConfigFile, Url

Bind = Annotated[
    str | None, typer.Option("--bind", metavar="HOST:PORT", help="Where it listens. [127.0.0.1:8088]", show_default=False)
]
DEFAULT_BIND = "127.0.0.1:8088"


def gateway(config: ConfigFile = None, url: Url = None, bind: Bind = None) -> None:
    """Serve models by name on one port (OpenAI, Anthropic).

    It is a client of the daemon: a restart of either ends no stream that the other has to do with.
    """
    import asyncio

    from pool_managerd._version import __version__
    from pool_managerd.config import split_address
    from pool_managerd.config.load import load_config
    from pool_managerd.gateway import process
    from pool_managerd.gateway.node_link import NodeLink
    from pool_managerd.httpd.server import listen
    from pool_managerd.telemetry.logs import LogOptions, configure_logging

    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None)
    loaded = load_config(path, env=os.environ, overrides={"gateway.bind": bind})
    where = loaded.gateway.bind or DEFAULT_BIND
    node = find_daemon(url, path, os.environ)
    logs = configure_logging(LogOptions(__version__, loaded.telemetry.log_format, loaded.telemetry.labels))
    try:
        listener = listen(where, share=True)
        link = NodeLink(node.url, lambda: find_daemon(url, path, os.environ).token)
        asyncio.run(process.serve(link, listener, process.options_of(loaded.gateway, split_address(where)[0])))
    finally:
        logs.close()
