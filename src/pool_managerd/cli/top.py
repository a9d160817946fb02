"""``top``: the command. It asks, and draws what it was told, until it is to end."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.gateway_client import GatewayClient, find_gateway
from pool_managerd.cli.options import ConfigFile, Url, daemon, seconds
from pool_managerd.cli.output import Format
from pool_managerd.cli.streams import end_with_reader
from pool_managerd.cli.top_following import Following
from pool_managerd.cli.top_screen import Bell, Screen, painted, size
from pool_managerd.cli.top_snapshot import Snapshot, as_json
from pool_managerd.cli.top_sources import TIMEOUT_S
from pool_managerd.cli.top_view import lines
from pool_managerd.errors import SpecError

_LEAST_S, _MOST_S, _USUAL_S = 0.2, 60.0, 1.0
_WHOLE = 10_000
_GATEWAY_PORT = 8088
Interval = Annotated[
    str | None, typer.Option("--interval", metavar="1s", help="How often it is drawn: 0.2s to 60s.", show_default=False)
]
Once = Annotated[bool, typer.Option("--once", help="One picture, and end: so it is in a pipe without --interval.")]
GatewayUrl = Annotated[
    str | None, typer.Option("--gateway-url", help="The gateway's address. [POOL_MANAGERD_GATEWAY_URL]", show_default=False)
]
Output = Annotated[Format, typer.Option("--output", "-o", help="table, wide (with --once: nothing is cut) or json, one a line.")]


def top(
    interval: Interval = None, once: Once = False, url: Url = None, gateway_url: GatewayUrl = None, config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Watch pools, slots, requests, tokens/s and GPUs; q ends it.

    Rates are those of the last 10 s, as the gateway counts: tokens when their request ends.
    """
    every_s = _interval(interval, once)
    node = daemon(url, config)
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    following = Following(node, gateway_of(gateway_url, node, config), bell := Bell())
    try:
        following.begin(time.monotonic() + TIMEOUT_S)
        if once or (interval is None and not terminal):
            _print(following.snapshot(), output)
        elif terminal and output is not Format.JSON:
            _on_screen(following, bell, every_s)
        else:
            _line_by_line(following, bell, every_s, output)
    except KeyboardInterrupt:
        return


def _interval(text: str | None, once: bool) -> float:
    if once and text is not None:
        raise CommandFailed("cannot use --once and --interval together", USAGE, hint="leave one of the two out")
    found = seconds(text, "--interval", f"write {_LEAST_S:g}s to {_MOST_S:g}s")
    if found is not None and not _LEAST_S <= found <= _MOST_S:
        raise CommandFailed(f"cannot use --interval {text}: it must be {_LEAST_S:g}s to {_MOST_S:g}s", USAGE)
    return _USUAL_S if found is None else found


def gateway_of(url: str | None, node: Daemon, config: Path | None) -> GatewayClient | str:
    """The one meant; else that of the daemon's machine. A text says why there is none."""
    from pool_managerd.httpd.peers import is_loopback

    host = urlsplit(node.url).hostname or ""
    if url is None and "POOL_MANAGERD_GATEWAY_URL" not in os.environ and not is_loopback(host):
        url = f"http://{f'[{host}]' if ':' in host else host}:{_GATEWAY_PORT}"
    try:
        return find_gateway(url, config)
    except SpecError as problem:  # the daemon is there all the same
        return problem.message


def _on_screen(following: Following, bell: Bell, every_s: float) -> None:
    with Screen(bell) as screen:
        due = time.monotonic() + every_s
        going = True
        while going:
            width, height = size()
            screen.draw(lines(following.snapshot(), width, height))
            going = screen.wait(due - time.monotonic())
            if time.monotonic() >= due:
                due = time.monotonic() + every_s
                following.ask()
            following.hear()


def _line_by_line(following: Following, bell: Bell, every_s: float, output: Format) -> None:
    end_with_reader()
    for _ in _beats(following, bell, every_s):
        _print(following.snapshot(), output)
        if output is not Format.JSON:
            sys.stdout.write("\n")
        sys.stdout.flush()


def _beats(following: Following, bell: Bell, every_s: float) -> Iterator[None]:
    """Once at the beginning, and then each time that all was asked for again."""
    due = time.monotonic()
    while True:
        yield
        due = max(due + every_s, time.monotonic())
        while (left := due - time.monotonic()) > 0:
            select.select([bell.fd], (), (), left)
            bell.quiet()
            following.hear()
        following.ask()
        following.hear_all(time.monotonic() + min(every_s, TIMEOUT_S))


def _print(shot: Snapshot, output: Format) -> None:
    """Whole in a pipe, and with -o wide; on a terminal as wide as that is."""
    if output is Format.JSON:
        sys.stdout.write(json.dumps(as_json(shot), ensure_ascii=False) + "\n")
        return
    width = size()[0] if sys.stdout.isatty() and output is not Format.WIDE else _WHOLE
    sys.stdout.writelines(painted(line) + "\n" for line in lines(shot, width))
