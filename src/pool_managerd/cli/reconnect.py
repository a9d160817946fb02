"""Following a stream of the daemon over its restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import CommandFailed
from pool_managerd.cli.output import Json, error

_FIRST_S = 0.1
_MOST_S = 5.0


def over_restarts(
    node: Daemon, *path: str, after: int | str | None = None, reached: bool = False, **query: str | int | bool
) -> Iterator[Json]:
    """The events of a stream, from behind ``after``; where it ends, it is asked for again, from behind the last one that came.

    That the daemon is gone is said once, on stderr. Raises CommandFailed when it refuses, or cannot be reached to begin with;
    ``reached``: it was before.
    """
    wait_s, told = _FIRST_S, False
    while True:
        place = {} if after is None else {"after": after}
        try:
            with node.stream(*path, sse=True, **query, **place) as chunks:
                reached, told = True, False
                for event in sse_events(chunks):
                    after, wait_s = event["id"], _FIRST_S
                    yield event
        except CommandFailed as failure:
            if not reached or not failure.passing:
                raise
            if not told:
                error("lost the daemon, waiting for it …")
                told = True
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _MOST_S)


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
