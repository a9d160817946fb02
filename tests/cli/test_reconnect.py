"""A stream is asked for again where it ends, from behind the last event that came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import REFUSED, UNREACHABLE, CommandFailed
from pool_managerd.cli.reconnect import over_restarts

GONE = CommandFailed("cannot reach the daemon", UNREACHABLE)
CROWDED = CommandFailed("too many streams", REFUSED, retriable=True)
UNKNOWN = CommandFailed("pool x not found", REFUSED)


class Node:
    """Each answer is what a connection gives, or why there is none; ``asked``: from behind what."""

    def __init__(self, *answers: bytes | CommandFailed) -> None:
        self._answers, self.asked = list(answers), list[Any]()

    @contextmanager
    def stream(self, *path: str, sse: bool, **query: Any) -> Iterator[Iterator[bytes]]:
        assert sse and path == ("events",)
        self.asked.append(query.get("after"))
        answer = self._answers.pop(0)
        if isinstance(answer, CommandFailed):
            raise answer
        yield iter([answer])


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("pool_managerd.cli.reconnect.time.sleep", found.append)
    return found


def event(number: int) -> bytes:
    return b'id: %d\ndata: {"id":%d}\n\n' % (number, number)


def followed(node: Node, **how: Any) -> tuple[list[int], CommandFailed]:
    ids: list[int] = []
    with pytest.raises(CommandFailed) as ended:
        ids.extend(found["id"] for found in over_restarts(cast("Daemon", node), "events", **how))
    return ids, ended.value


def test_it_goes_on_behind_the_last_one_and_ends_with_a_refusal(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    node = Node(event(1) + event(2) + b"id: 3\nda", GONE, GONE, CROWDED, event(3), event(4), UNKNOWN)
    assert followed(node, after=0) == ([1, 2, 3, 4], UNKNOWN)
    assert (node.asked, len(pauses)) == ([0, 2, 2, 2, 2, 3, 4], 6)
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8] and pauses[4] == 0.1, "it waits longer and longer, until something comes again"
    assert capsys.readouterr().err == "lost the daemon, waiting for it …\n", "a stream that ended and is there again is no loss"


def test_the_wait_is_bounded(pauses: list[float]) -> None:
    followed(Node(event(1), *[GONE] * 20, UNKNOWN))
    assert max(pauses) == pauses[-1] == 5.0


def test_a_daemon_that_was_never_there_is_an_error_at_once(pauses: list[float]) -> None:
    assert followed(Node(GONE)) == ([], GONE)
    assert followed(Node(GONE, UNKNOWN), reached=True)[1] is UNKNOWN and len(pauses) == 1, "unless it just was"
