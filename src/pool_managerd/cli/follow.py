"""Commands that show what goes by: the engine's log and the node's events."""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from pool_managerd.cli import completion
from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import USAGE, CommandFailed
from pool_managerd.cli.options import ConfigFile, Output, PoolId, Url, daemon, seconds
from pool_managerd.cli.output import Format, Json, moment, paint, printable
from pool_managerd.cli.reconnect import over_restarts, sse_events
from pool_managerd.cli.streams import end_with_reader
from pool_managerd.cli.table import wrapped

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")]
Lines = Annotated[int, typer.Option("--tail", "--lines", "-n", min=0, max=10_000, help="How many of the last lines.")]
Replica = Annotated[
    str | None,
    typer.Option("--replica", metavar="r0|r1", help="Of this replica, such as one that a reload has tried.", show_default=False),
]
Previous = Annotated[bool, typer.Option("--previous", "-p", help="Of the launch before the last one.")]
_FEW = 20
Count = Annotated[
    int | None,
    typer.Option(
        "--tail", "-n", min=0, max=10_000, help=f"How many of the last ones; {_FEW} without --since.", show_default=False
    ),
]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Only what is younger, such as 30s, 10m or 2h.", show_default=False)
]
SinceId = Annotated[
    int | None,
    typer.Option(
        "--since-id", metavar="ID", min=0, help="Only what came behind this event; 0: all there is.", show_default=False
    ),
]
OfPool = Annotated[
    list[str] | None,
    typer.Option("--pool", metavar="ID", help="Only of this pool; may be repeated.", autocompletion=completion.pool_ids),
]
Level = Annotated[str, typer.Option("--level", help="debug, info, warn or error: this and what is worse.")]
_LEVELS = {"debug": 0, "info": 1, "warn": 2, "warning": 2, "error": 3, "critical": 4}
# One happening, one line: what these tell is told again, with its outcome, by the event that follows at once.
_STEPS = frozenset({"died", "operation", "staging", "transition"})


def logs(
    pool_id: PoolId, follow: Follow = False, lines: Lines = 200, since: Since = None, previous: Previous = False,
    replica: Replica = None, url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Show the log of a pool's engine.

    Engines write no times: --since begins where the log stood then, give or take seconds. -f goes on when the daemon
    restarts. With -o json it is one object, and with -f one a line.
    """
    if follow and previous:
        raise CommandFailed("cannot follow a log that has ended", USAGE, hint="leave -f or --previous out")
    age = seconds(since, "--since")
    query: dict[str, Any] = {"lines": lines}
    query |= {} if age is None else {"since_ms": round(age * 1000)}
    query |= {"previous": True} if previous else {}
    query |= {} if replica is None else {"replica": replica}
    node = daemon(url, config)
    if follow:
        _follow_log(node, pool_id, query, output)
        return
    with node.stream("pools", pool_id, "logs", **query) as chunks:
        if output is not Format.JSON:
            for text in _decoded(chunks):
                sys.stdout.write(_shown(text))
                sys.stdout.flush()
        else:
            answer = {"pool_id": pool_id, "lines": list(_lines(_decoded(chunks)))}
            sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")


def _follow_log(node: Daemon, pool_id: str, query: Mapping[str, Any], output: Format) -> None:
    end_with_reader()
    pieces = over_restarts(node, "pools", pool_id, "logs", follow=True, **query)
    texts = (str(piece["text"]) for piece in pieces)
    if output is Format.JSON:
        for line in _lines(texts):
            _json_line({"pool_id": pool_id, "line": line})
    for text in texts:
        sys.stdout.write(_shown(text))
        sys.stdout.flush()


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """As text; a sign that is cut in two waits for its rest."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return (decode(chunk) for chunk in chunks)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines, as they come."""
    rest = ""
    for text in texts:
        *whole, rest = (rest + text).split("\n")
        yield from whole
    if rest:
        yield rest


def events(
    follow: Follow = False, count: Count = None, since: Since = None, since_id: SinceId = None, pool: OfPool = None,
    level: Level = "info", url: Url = None, config: ConfigFile = None, output: Output = Format.TABLE,
) -> None:  # fmt: skip
    """Show what happened: crashes, restarts, drains, GPUs.

    The last few, or what --since, --since-id and -n say; -f goes on with what happens, when the daemon restarts, too. With -o
    json one object a line. Ids go on over restarts of the daemon; where not everything behind an id is kept, an event "gap"
    says so.
    """
    if level not in _LEVELS:
        raise CommandFailed(f"cannot use --level {level[:40]!r}", USAGE, hint="write debug, info, warn or error")
    floor, pools, age = _LEVELS[level], frozenset(pool or ()), seconds(since, "--since")
    oldest_ms = 0.0 if age is None else (time.time() - age) * 1000
    node = daemon(url, config)
    found: list[Json] = []
    last_id = 0
    with node.stream("events", after=since_id or 0, follow=False) as chunks:
        for event in sse_events(chunks):
            last_id = max(last_id, int(event.get("id") or 0))
            if event.get("ts_ms", 0) >= oldest_ms and _wanted(event, floor, pools):
                found.append(event)
    most = count if count is not None else _FEW if age is None and since_id is None else None
    show = _Shown(output)
    for event in found if most is None else found[-most:] if most else ():
        show(event)
    if follow:
        end_with_reader()
        for event in over_restarts(node, "events", after=last_id, reached=True, follow=True):
            if _wanted(event, floor, pools):
                show(event)


def _wanted(event: Json, floor: int, pools: frozenset[str]) -> bool:
    if event.get("type") == "gap":
        return True  # it concerns whatever was asked for
    if pools and event.get("pool_id") not in pools:
        return False
    step = event.get("type") in _STEPS or (event.get("type") == "stop" and event.get("grace_ms") is not None)
    return _LEVELS.get(str(event.get("level")), 1) >= floor and (floor == 0 or not step)


class _Shown:
    """Prints events one by one; what the line before has said is not said again."""

    def __init__(self, output: Format) -> None:
        self._output = output
        self._error: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._recent: deque[str] = deque(maxlen=_FEW)

    def __call__(self, event: Json) -> None:
        if self._output is Format.JSON:
            _json_line(event)
            return
        pool, kind, told = str(event.get("pool_id") or ""), event.get("type"), event.get("last_error")
        human = str(event.get("human"))
        before, self._last[pool] = self._last.get(pool), kind
        if kind == "crash" and (event.get("exit_code"), event.get("signal")) != (None, None):
            # The sentence says how it ended, the error may say why. Of one that was ended it was said why just before.
            if told and told not in (f"signal {event.get('signal')}", f"exit_code={event.get('exit_code')}"):
                human += f": {told}"
        elif told is not None and self._error.get(pool) == told:
            return  # a start that failed by this crash
        elif kind == "stopped" and before == "drain_finished":
            return
        elif kind == "preflight" and any(human in line for line in self._recent):
            return  # what stood in a pool's way was said with its name
        self._error[pool] = told
        self._recent.append(human)
        level = str(event.get("level", ""))
        style = {"warn": "1", "error": "31", "critical": "31"}.get(level, "")
        when = str(moment(event.get("ts_ms"), short=sys.stdout.isatty()))
        text = " ".join(printable(human if pool in human else f"{pool}: {human}").split())
        sys.stdout.write(f"{when}  {paint(f'{level:<8}', style)}  {wrapped(text, len(when) + 12)}\n")
        sys.stdout.flush()


def _json_line(value: Json) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _shown(text: str) -> str:
    """As it is into a pipe; on a terminal without the control characters an engine might print."""
    return printable(text) if sys.stdout.isatty() else text
