"""What is known of one request: when it was where, and what the engine has counted. What it says only where that is captured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from pool_managerd.gateway.captures import Capture

_TAIL_BYTES = 4096
_COUNT = re.compile(
    rb'"(prompt_tokens|completion_tokens|cached_tokens|input_tokens|output_tokens|cache_read_input_tokens|prompt_n|predicted_n'
    rb'|cache_n)"\s*:\s*(\d{1,9})\b'
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """As the engine counted them; ``prompt`` includes those that were ``cached``. None: it did not say."""

    prompt: int | None = None
    answer: int | None = None
    cached: int | None = None


@dataclass(slots=True)
class Record:
    """``state``: queued, running, ended, failed or cancelled. Times are monotonic seconds, but for ``began_ms`` (unix)."""

    request_id: str
    path: str
    key: str | None = None
    model: str | None = None
    pool_id: str | None = None
    engine: str = "unknown"
    state: str = "queued"
    status: int = 0
    error: str | None = None
    began: float = field(default_factory=time.monotonic)
    began_ms: int = field(default_factory=lambda: round(time.time() * 1000))
    leased: float | None = None
    first: float | None = None
    ended: float | None = None
    capture: Capture | None = None
    _tail: bytes = b""
    _events: int = 0
    _counted: Tokens | None = None

    def passes(self, chunk: bytes) -> None:
        """A part of the answer goes by."""
        if self.first is None:
            self.first = time.monotonic()
        self._events += chunk.count(b"data:")
        self._tail = chunk if len(chunk) >= _TAIL_BYTES else (self._tail + chunk)[-_TAIL_BYTES:]
        if self.capture is not None:
            self.capture.passes(chunk)

    def over(self) -> None:
        """Its answer has ended: nothing stays of that but what the engine has counted."""
        self.ended, self._counted, self._tail = time.monotonic(), self.tokens(), b""

    def tokens(self) -> Tokens:
        """What the end of the answer says of them, in any dialect."""
        if self._counted is not None:
            return self._counted
        told = {name.decode(): int(number) for name, number in _COUNT.findall(self._tail)}
        if "prompt_tokens" in told:
            return Tokens(told["prompt_tokens"], told.get("completion_tokens"), told.get("cached_tokens", told.get("cache_n")))
        if "output_tokens" in told:
            cached = told.get("cache_read_input_tokens", told.get("cached_tokens"))
            beside = told.get("cache_read_input_tokens", 0)
            read = told.get("input_tokens")
            return Tokens(None if read is None else read + beside, told["output_tokens"], cached)
        if "predicted_n" in told:
            return Tokens(told.get("prompt_n", 0) + told.get("cache_n", 0), told["predicted_n"], told.get("cache_n"))
        return Tokens()

    def spent(self) -> int:
        """Tokens of its prompt and its answer; of one that was broken off, as many as there were events."""
        found = self.tokens()
        return (found.prompt or 0) + (self._events if found.answer is None else found.answer)

    def to_dict(self) -> dict[str, Any]:
        """For people and machines."""
        now, found = time.monotonic(), self.tokens()
        until = now if self.ended is None else self.ended
        return {
            "request_id": self.request_id, "path": self.path, "key": self.key, "model": self.model, "pool_id": self.pool_id,
            "state": self.state, "status": self.status or None, "error": self.error, "began_at_ms": self.began_ms,
            "queued_ms": round(((until if self.leased is None else self.leased) - self.began) * 1000),
            "first_token_ms": None if self.first is None else round((self.first - self.began) * 1000),
            "decode_time_ms": None if self.first is None else round((until - self.first) * 1000),
            "duration_ms": round((until - self.began) * 1000),
            "tokens_in": found.prompt, "tokens_out": found.answer, "tokens_cached": found.cached,
        }  # fmt: skip
