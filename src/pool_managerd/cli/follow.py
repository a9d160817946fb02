"""Commands that show what goes by: the engine's log and the node's events."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer

from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon
from pool_managerd.cli.output import Format, moment, printable

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")]
Lines = Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many of the last lines.")]


def logs(
    pool_id: PoolId,
    follow: Follow = False,
    lines: Lines = 200,
    url: Url = None,
    config: ConfigFile = None,
    output: Output = Format.TABLE,
) -> None:
    """Show the log of a pool's engine."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    text: list[str] = []
    with suppress(KeyboardInterrupt), daemon(url, config).stream("pools", pool_id, "logs", lines=lines, follow=follow) as chunks:
        for chunk in chunks:
            if output is Format.JSON and not follow:
                text.append(decode(chunk))
            else:
                sys.stdout.write(_shown(decode(chunk)))
                sys.stdout.flush()
    if output is Format.JSON and not follow:
        sys.stdout.write(json.dumps({"pool_id": pool_id, "lines": "".join(text).splitlines()}, indent=2) + "\n")


def events(follow: Follow = False, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE) -> None:
    """Show what happened: transitions, crashes, operations. With -o json one object a line."""
    with suppress(KeyboardInterrupt), daemon(url, config).stream("events", after=0, follow=follow) as chunks:
        for event in sse_events(chunks):
            if output is Format.JSON:
                sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
            else:
                human = printable(str(event.get("human")))
                sys.stdout.write(
                    f"{moment(event.get('ts_ms'))}  {event.get('level', ''):<8} {event.get('pool_id') or '-':<12} {human}\n"
                )
            sys.stdout.flush()


def sse_events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event."""
    pending = bytearray()
    for chunk in chunks:
        looked = max(0, len(pending) - 1)
        pending += chunk
        if pending.find(b"\n\n", looked) < 0:
            continue
        *frames, rest = bytes(pending).split(b"\n\n")
        pending = bytearray(rest)
        for frame in frames:
            data = b"\n".join(line[6:] for line in frame.split(b"\n") if line.startswith(b"data: "))
            if data:
                yield json.loads(data)


def _shown(text: str) -> str:
    """As it is into a pipe; on a terminal without the control characters an engine might print."""
    return printable(text) if sys.stdout.isatty() else text
