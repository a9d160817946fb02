"""How an engine is put to sleep and woken: it gives its GPU memory back meanwhile, and keeps its process.

What an engine says of its memory then is not believed; whether that is free is seen on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pool_managerd.core.question import Question


@dataclass(frozen=True, slots=True)
class SleepDialect:
    """``flag`` on its command line is what makes an engine able to sleep; ``needs`` says what else does, for people.

    ``sleep`` is None for an engine that falls asleep when it has had nothing to do for a while, and that anybody's request wakes.
    ``asleep`` asks whether it sleeps; the answer has that under ``key``.
    """

    flag: str
    asleep: Question
    wake: Question
    sleep: Question | None = None
    key: str = "is_sleeping"
    needs: str = ""

    @property
    def by_itself(self) -> bool:
        """Nobody tells it when to."""
        return self.sleep is None

    def speaks(self, flags: Sequence[str]) -> bool:
        """Whether an engine with these flags can sleep, as far as they tell."""
        return any(word == self.flag or word.startswith(f"{self.flag}=") for word in flags)

    def is_asleep(self, answer: Any) -> bool:
        """Raises ValueError for an answer that does not say."""
        told = answer.get(self.key) if isinstance(answer, dict) else None
        if not isinstance(told, bool):
            raise ValueError(f"it answered {self.asleep.path} without {self.key}")
        return told
