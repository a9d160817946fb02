"""The configurations that were in the daemon's file when it applied them: numbered, bounded, kept over its end.

Their texts are kept without secrets (config/withheld.py). What this daemon has seen of those is kept in memory, so that it can
put them back as long as it runs; a later one only has those that the file still names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pool_managerd.config import Config
from pool_managerd.config.withheld import restored, secrets_of, taken_out
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision.protocols import Facts

APPLIED = "applied"
"""The kind of the facts, by number."""
KEPT = 20
DONE, FAILED, UNFINISHED, NOT_APPLIED = "done", "failed", "not finished", "not applied"
"""How it ended: ``not finished`` also where the daemon ended before it; ``not applied`` are edits of the file that another
configuration took the place of.
"""
MAX_CHARS = 2 << 20
"""Of all texts together: the oldest go first."""


class Applied:
    """Of one node. ``wall_ms`` is unix time in ms."""

    def __init__(self, facts: Facts, wall_ms: Callable[[], int]) -> None:
        self._facts, self._wall_ms = facts, wall_ms
        self._known: dict[int, dict[str, Any]] = {}
        self._secrets: dict[str, str] = {}

    def restore(self) -> None:
        """Those of earlier daemons, once the state is open."""
        self._known = {int(key): dict(fact) for key, fact in self._facts.facts(APPLIED).items() if key.isdecimal()}

    def rows(self) -> list[dict[str, Any]]:
        """``{number, at_ms, origin, summary, pools, result, failed, kept}``, oldest first, the last one is the present.
        ``failed``: for how many pools. ``kept``: it can come back.
        """
        shown = ("at_ms", "origin", "summary", "pools", "result", "failed")
        return [
            {"number": number, **{key: fact.get(key) for key in shown}, "kept": fact.get("text") is not None}
            for number, fact in sorted(self._known.items())
        ]

    def text(self, number: int, present: Config, path: Path) -> str:
        """What was in the file, with the secrets that ``present`` or this daemon has. Raises RequestError, SpecError."""
        fact = self._known.get(number)
        if fact is None:
            raise RequestError(
                f"configuration {number} not found", code="CONFIGURATION_NOT_FOUND", status=404,
                hint="pool-managerd config history lists them",
            )  # fmt: skip
        if fact.get("text") is None:
            raise SpecError(
                f"cannot bring configuration {number} back: its text is not kept, as a secret in it could not be taken out",
                code="CONFIG_ERROR", hint="write it into the file by hand",
            )  # fmt: skip
        known = self._secrets | {word: value for word, (_, value) in secrets_of(present).items()}
        return restored(str(fact["text"]), fact.get("withheld") or {}, known, path)

    async def keep(
        self, text: str, config: Config, path: Path, origin: str, summary: str, *, result: str = UNFINISHED
    ) -> int | None:
        """``text`` of ``path`` is applied from now on; its number, None where it is the last one anyway. Durable at its return.

        Raises NodeError.
        """
        if (made := self._made(text, config, path, origin, summary)) is None:
            return None
        number, fact = made
        fact |= {"result": result, "failed": None}
        await self._facts.put_fact(APPLIED, str(number), fact)
        self._known[number] = fact
        self._forget_oldest()
        return number

    def begun(self) -> None:
        """The last one is being applied."""
        self._mark(UNFINISHED, None)

    def ended(self, failed: int) -> None:
        """The last one is applied, but for as many pools."""
        self._mark(FAILED if failed else DONE, failed)

    def _mark(self, result: str, failed: int | None) -> None:
        if last := max(self._known, default=0):
            self._known[last] = {**self._known[last], "result": result, "failed": failed}
            self._facts.note_fact(APPLIED, str(last), self._known[last])

    def forget(self, number: int | None) -> None:
        """It was not applied after all."""
        if number is not None and self._known.pop(number, None) is not None:
            self._facts.note_fact(APPLIED, str(number), None)

    def note(self, text: str, config: Config, path: Path, origin: str, summary: str) -> None:
        """As ``keep``, without waiting for the disk."""
        if (made := self._made(text, config, path, origin, summary)) is not None:
            number, fact = made
            self._facts.note_fact(APPLIED, str(number), fact)
            self._known[number] = fact
            self._forget_oldest()

    def _made(self, text: str, config: Config, path: Path, origin: str, summary: str) -> tuple[int, dict[str, Any]] | None:
        self._secrets |= {word: value for word, (_, value) in secrets_of(config).items()}
        kept = taken_out(text, config, path)
        digest = None if kept is None else hashlib.sha256(kept[0].encode()).hexdigest()
        last = max(self._known, default=0)
        if last and digest is not None and self._known[last].get("digest") == digest:
            return None
        fact = {
            "at_ms": self._wall_ms(), "origin": origin, "summary": summary, "pools": len(config.pools), "digest": digest,
            "text": None if kept is None else kept[0], "withheld": {} if kept is None else kept[1],
        }  # fmt: skip
        return last + 1, fact

    def _forget_oldest(self) -> None:
        """The last one always stays."""
        chars = 0
        for place, number in enumerate(sorted(self._known, reverse=True)):
            chars += len(self._known[number].get("text") or "")
            if place and (place >= KEPT or chars > MAX_CHARS):
                self.forget(number)
