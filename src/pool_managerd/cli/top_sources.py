"""Where the news comes from: the daemon and the gateway, each asked in a thread of its own, so that neither keeps the picture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import REFUSED, CommandFailed
from pool_managerd.cli.gateway_client import GatewayClient
from pool_managerd.cli.output import Json
from pool_managerd.cli.reconnect import sse_events
from pool_managerd.cli.top_rates import Sample, read
from pool_managerd.cli.top_snapshot import NodeAnswers

TIMEOUT_S = 5.0
_ERRORS = ("error", "critical")
Answer = TypeVar("Answer")


class Source(Generic[Answer]):
    """One question at a time; ``wake`` is called when it is answered."""

    def __init__(self, question: Callable[[], Answer], wake: Callable[[], None]) -> None:
        self._question, self._wake = question, wake
        self._came: list[Answer | Exception] = []
        self._asked = False

    @property
    def asked(self) -> bool:
        """It has not answered yet."""
        return self._asked

    def ask(self) -> None:
        """Unless it is being asked already."""
        if not self._asked:
            self._asked = True
            threading.Thread(target=self._answer, name="top", daemon=True).start()

    def take(self) -> Answer | CommandFailed | None:
        """The answer, or why there is none; None while there is no news."""
        if not self._came:
            return None
        came = self._came.pop()
        self._asked = False
        if isinstance(came, Exception) and not isinstance(came, CommandFailed):
            raise came
        return came

    def _answer(self) -> None:
        try:
            self._came.append(self._question())
        except Exception as problem:  # noqa: BLE001 - it is raised where the answer is taken
            self._came.append(problem)
        self._wake()


class NodeQuestions:
    """All that is asked of the daemon for one picture."""

    def __init__(self, node: Daemon) -> None:
        self._node = node
        self._last_id = 0
        self._last_error: Json | None = None

    def __call__(self) -> NodeAnswers:
        """Raises CommandFailed when the daemon does not answer, or refuses what every user may read."""
        pools = _rows(self._node.get("pools"), "pool_id")
        if pools is None:
            raise CommandFailed(f"cannot read the answer of {self._node.url}: it is no list of pools", REFUSED)
        health, devices = self._node.get("health"), self._node.get("devices")
        queue, yields, error = (self._private(ask) for ask in (self._queue, self._yields, self._error))
        health = health if isinstance(health, dict) else {}
        return NodeAnswers(
            health.get("version"), str(health.get("status", "ok")), pools, devices if isinstance(devices, dict) else {},
            queue, yields, error or self._last_error,
        )  # fmt: skip

    def _queue(self) -> tuple[Json, ...] | None:
        return _rows(self._node.get("queue"), "ticket_id")

    def _yields(self) -> tuple[Json, ...] | None:
        return _rows(self._node.get("yield"), "uuid")

    def _error(self) -> Json | None:
        """The last event that is an error; each event is read once."""
        with self._node.stream("events", after=self._last_id, follow=False) as chunks:
            for event in sse_events(chunks):
                self._last_id = int(event.get("id") or self._last_id)
                if event.get("level") in _ERRORS:
                    self._last_error = event
        return self._last_error

    @staticmethod
    def _private(ask: Callable[[], Any]) -> Any:
        """None where it is refused: it is for the daemon's own user, or the daemon is an older one."""
        try:
            return ask()
        except CommandFailed as failure:
            if failure.exit_code != REFUSED:
                raise
            return None


def counters_of(gateway: GatewayClient) -> Callable[[], Sample]:
    """Asks it for what it has counted."""
    return lambda: read(gateway.page("/metrics", TIMEOUT_S))


def _rows(answer: Any, key: str) -> tuple[Json, ...] | None:
    """A list of objects that all have this ``key``; None for anything else."""
    rows = isinstance(answer, list) and all(isinstance(row, dict) and key in row for row in answer)
    return tuple(answer) if rows else None
