"""Fakes of what an engine is watched by: its probes and counters, and what its processes use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.bench import TimedAnswer
from pool_managerd.core.engines import CounterNames
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult
from pool_managerd.core.listeners import OURS, Listener
from pool_managerd.core.question import Question

GOOD = ProbeResult(ProbeOutcome.SUCCESS)


class FakeProber:
    """Answers with ``result``; ``first_token_ms`` None makes the warm-up fail. ``told`` are the engine's counters, if any,
    ``says`` what it makes of a prompt, ``answers`` what it answers to whatever else it is asked. ``timed_prompts`` are those that
    were timed, ``at_once`` how many of them at most.
    """

    def __init__(self) -> None:
        self.result = GOOD
        self.first_token_ms: float | None = 20.0
        self.tokens_per_s = 50.0
        self.says = "four"
        self.probes = 0
        self.told: Counters | None = None
        self.questions: list[Question] = []
        self.answers: Callable[[Question], Any] = lambda question: None
        self.primed: list[str] = []
        self.stuck = False
        self.timed_prompts: list[str] = []
        self.at_once = self.at_once_now = 0

    async def probe(self, url: str, timeout_s: float) -> ProbeResult:
        self.probes += 1
        return self.result

    async def counters(self, url: str, names: CounterNames, timeout_s: float) -> Counters | None:
        return self.told

    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        if self.first_token_ms is None:
            raise ValueError("no token")
        return self.first_token_ms, self.tokens_per_s

    async def ask(self, url: str, question: Question) -> Any:
        self.questions.append(question)
        return self.answers(question)

    async def prime(self, engine: AnyEngine, prompt: str, timeout_s: float) -> float:
        self.primed.append(prompt)
        return 5.0

    async def complete(self, engine: AnyEngine, prompt: str, timeout_s: float) -> str:
        return self.says

    async def timed(self, engine: AnyEngine, prompt: str, tokens: int) -> TimedAnswer:
        """``tokens`` at the rate that it has, at once; with ``stuck`` set never."""
        self.timed_prompts.append(prompt)
        self.at_once_now += 1
        self.at_once = max(self.at_once, self.at_once_now)
        try:
            await (asyncio.Event().wait() if self.stuck else asyncio.sleep(0))
        finally:
            self.at_once_now -= 1
        if self.first_token_ms is None:
            raise ValueError("the engine answered 400: too long")
        first = self.first_token_ms / 1000
        times = tuple(first + number / self.tokens_per_s for number in range(tokens))
        return TimedAnswer(times, tokens, 3 + 2 * len(prompt.split()))


@dataclass
class FakeUsages:
    """All engines use the same, and have the same ``clients``, which a test moves; while ``seen`` is false, nothing is known."""

    cpu_s: float = 0.0
    memory_bytes: int = 0
    data_bytes: int | None = 0
    stopped: str = ""
    blocked: str = ""
    seen: bool = False
    clients: tuple[float, ...] = ()

    def reader(self, pid: int) -> FakeUsages:
        return self

    async def read(self, *, full: bool) -> FakeUsages | None:
        return replace(self) if self.seen else None

    def stuck(self, pid: int) -> str:
        return self.blocked

    async def silent_clients(self, port: int) -> tuple[float, ...]:
        return self.clients


class FakeListeners:
    """Says who holds every engine's port: the engine, until ``found`` says otherwise."""

    def __init__(self, found: Listener = OURS, elsewhere: Sequence[str] = ()) -> None:
        self.found, self.others = found, list(elsewhere)
        self.looks = 0

    async def __call__(self, pid: int, host: str, port: int) -> Listener:
        return self.found

    async def elsewhere(self, pid: int) -> list[str]:
        self.looks += 1
        return self.others
