"""How many tokens each key has used today: of prompts and answers, counted as engines tell them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from pool_managerd.errors import RequestError
from pool_managerd.gateway import private_json
from pool_managerd.gateway.keys import Key
from pool_managerd.gateway.tally import Tally

log = structlog.get_logger("pool_managerd.gateway")
_SAVE_S = 5.0
_DAY_S = 86_400
_MAX_BYTES = 1 << 20


class Budgets:
    """``place`` is a file that another gateway goes on with; days are those of UTC. What was used in the last seconds before a
    gateway is killed is not remembered. ``tally`` is what all workers of one count in.
    """

    def __init__(self, place: Path, tally: Tally | None = None, now: Callable[[], float] = time.time) -> None:
        self._place, self._now, self._tally = place, now, tally or Tally()
        self._saving: asyncio.TimerHandle | None = None
        self._told = False
        if self._tally.day == 0 and self._tally.begin_day(self._today()):
            self._read()

    def used(self, name: str) -> int:
        """Today, by the key of that name."""
        self._see_the_day()
        return self._tally.tokens(name)

    def require(self, key: Key) -> None:
        """Raises RequestError BUDGET_SPENT (429) for one that has used all that it has for a day."""
        if key.daily_tokens is None or (used := self.used(key.name)) < key.daily_tokens:
            return
        left_s = _DAY_S - self._now() % _DAY_S
        raise RequestError(
            f"the API key '{key.name}' has used {used:,} of the {key.daily_tokens:,} tokens that it has for a day",
            code="BUDGET_SPENT", status=429, retry_after_ms=round(left_s * 1000), hint="a day ends at 00:00 UTC",
        )  # fmt: skip

    def count(self, name: str, tokens: int) -> None:
        """The key of that name has used so many more."""
        if tokens > 0:
            self._see_the_day()
            self._tally.spend(name, tokens)
            if self._saving is None:
                self._saving = asyncio.get_running_loop().call_later(_SAVE_S, self.save)

    def save(self) -> None:
        """Write it down. A disk that does not take it is told once."""
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        try:
            private_json.write(self._place, {"day": self._tally.day, "used": self._tally.spent()}, durable=False)
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning(f"What keys have used today cannot be written to {self._place}: {error.strerror}", action="budgets")

    def _see_the_day(self) -> None:
        if self._tally.day != (today := self._today()):
            self._tally.begin_day(today)

    def _today(self) -> int:
        return int(self._now() // _DAY_S)

    def _read(self) -> None:
        try:
            with self._place.open("rb") as file:
                raw = json.loads(file.read(_MAX_BYTES))
            if raw["day"] == self._tally.day:
                for name, used in {str(name): int(used) for name, used in raw["used"].items()}.items():
                    self._tally.spend(name, used)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            log.warning(f"What keys have used today is counted anew: {self._place} cannot be read ({problem})", action="budgets")


def beside(keys: Path) -> Path:
    """Where it is kept, for the keys in that file."""
    return keys.with_name(keys.name + ".used")
