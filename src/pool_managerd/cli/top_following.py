"""The latest of what daemon and gateway say, over their restarts."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import replace

from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import CommandFailed
from pool_managerd.cli.gateway_client import GatewayClient
from pool_managerd.cli.top_rates import Sample, Window, in_flight
from pool_managerd.cli.top_screen import Bell
from pool_managerd.cli.top_snapshot import GatewayAnswers, NodeAnswers, Snapshot
from pool_managerd.cli.top_sources import TIMEOUT_S, NodeQuestions, Source, counters_of

_SLOW_S = 2.0


class Following:
    """``gateway`` is a text where it is known that there is none: why."""

    def __init__(self, node: Daemon, gateway: GatewayClient | str, bell: Bell) -> None:
        self._bell = bell
        self._url = node.url
        bounded = replace(node, timeout_s=TIMEOUT_S, silence_s=TIMEOUT_S)
        self._node = Source[NodeAnswers](NodeQuestions(bounded), bell.ring)
        self._gateway = None if isinstance(gateway, str) else Source[Sample](counters_of(gateway), bell.ring)
        self._answers = NodeAnswers()
        self._told = GatewayAnswers(problem=gateway) if isinstance(gateway, str) else GatewayAnswers(gateway.url)
        self._window = Window()
        self._failed: tuple[int, str] | None = None
        self._asked_at, self._reached = 0.0, False

    def begin(self, deadline: float) -> None:
        """The first answers. Raises CommandFailed when the daemon gives none, as every command does."""
        self.ask()
        self._hear_until(lambda: self._reached, float("inf"))
        self.hear_all(deadline)

    def ask(self) -> None:
        """For news, unless that is under way."""
        if not self._node.asked:
            self._asked_at = time.monotonic()
        self._node.ask()
        if self._gateway is not None:
            self._gateway.ask()

    def hear(self) -> None:
        """Take what was answered. Raises CommandFailed when the daemon refuses."""
        answer = self._node.take()
        if isinstance(answer, CommandFailed):
            if not self._reached or not answer.passing:
                raise answer
            self._failed = self._failed or (_wall_ms(), answer.message)
        elif answer is not None:
            self._answers, self._failed, self._reached = answer, None, True
        if self._gateway is not None:
            self._count(self._gateway.take())

    def hear_all(self, deadline: float) -> None:
        """Until both have answered, or ``deadline`` (monotonic) has come."""
        self._hear_until(lambda: not (self._node.asked or (self._gateway is not None and self._gateway.asked)), deadline)

    def snapshot(self) -> Snapshot:
        return Snapshot(_wall_ms(), self._url, self._answers, self._told, self._away())

    def _away(self) -> tuple[int, str] | None:
        """It failed, or takes its time."""
        waited = time.monotonic() - self._asked_at if self._node.asked else 0.0
        if self._failed is None and waited > _SLOW_S:
            return _wall_ms() - round(waited * 1000), "it does not answer"
        return self._failed

    def _count(self, sample: Sample | CommandFailed | None) -> None:
        if isinstance(sample, CommandFailed):
            self._told = GatewayAnswers(self._told.url, problem=sample.message)
        elif sample is not None:
            self._window.add(time.monotonic(), sample)
            self._told = GatewayAnswers(self._told.url, in_flight(sample), self._window.rates() or None)

    def _hear_until(self, done: Callable[[], bool], deadline: float) -> None:
        while not done() and (left := deadline - time.monotonic()) > 0:
            select.select([self._bell.fd], (), (), min(left, TIMEOUT_S))
            self._bell.quiet()
            self.hear()


def _wall_ms() -> int:
    return round(time.time() * 1000)
