"""A bench: an engine measured on purpose. What may be asked for, and what the answers say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pool_managerd.core.baselines import Baseline
from pool_managerd.core.narration import count
from pool_managerd.errors import SpecError

TOKENS, PROMPT_TOKENS, RUNS = 128, 512, 3
MAX_TOKENS, MAX_PROMPT_TOKENS, MAX_RUNS = 2_048, 16_384, 20
MAX_SLOTS = 256
"""So many requests at once at most."""
LIMIT_S = 600.0
"""A bench is over by then: it has what it needs, or it has failed."""
_LEAST_TOKENS = 2
_WORDS = ("river", "stone", "lamp", "house", "green", "table", "music", "paper", "winter", "light", "garden", "bread")


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Measure ``pool_id``: ``runs`` times one request alone, then as often all slots at once; each with a prompt of about
    ``prompt_tokens`` and ``tokens`` to make. None: 512 and 128, or what the context of a slot has room for.

    Raises SpecError for a number that is out of bounds.
    """

    pool_id: str
    tokens: int | None = None
    prompt_tokens: int | None = None
    runs: int = RUNS

    def __post_init__(self) -> None:
        bounds = (
            ("tokens", self.tokens, _LEAST_TOKENS, MAX_TOKENS), ("prompt_tokens", self.prompt_tokens, 1, MAX_PROMPT_TOKENS),
            ("runs", self.runs, 1, MAX_RUNS),
        )  # fmt: skip
        for name, given, low, high in bounds:
            if given is not None and (isinstance(given, bool) or not low <= given <= high):
                raise SpecError(
                    f"cannot bench pool {self.pool_id} with {name} {given}: it must be from {low} to {high}", pool_id=self.pool_id
                )

    def sizes(self, room: int | None) -> tuple[int, int]:
        """(prompt tokens, tokens) of each request where a slot has ``room`` tokens of context. Raises SpecError."""
        tokens = self.tokens or (TOKENS if room is None else max(_LEAST_TOKENS, min(TOKENS, room // 4)))
        prompt = self.prompt_tokens or (PROMPT_TOKENS if room is None else max(1, min(PROMPT_TOKENS, room // 2)))
        if room is not None and prompt + tokens > room:
            raise SpecError(
                f"cannot bench pool {self.pool_id} with {prompt} tokens of prompt and {tokens} to make: "
                f"a slot has {room} tokens of context", pool_id=self.pool_id, hint="ask for fewer, or raise 'ctx' of the pool",
            )  # fmt: skip
        return prompt, tokens


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """One streamed answer: seconds from the request to each piece of it, and what the engine has counted, where it tells."""

    times_s: tuple[float, ...]
    tokens: int
    prompt_tokens: int | None = None
    prompt_tokens_per_s: float | None = None

    @property
    def first_s(self) -> float:
        return self.times_s[0]

    @property
    def tokens_per_s(self) -> float:
        """From its first token to its last."""
        return (self.tokens - 1) / max(self.times_s[-1] - self.times_s[0], 1e-6)

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens per second: as the engine tells, else by the time to the first token."""
        if self.prompt_tokens_per_s is not None or self.prompt_tokens is None:
            return self.prompt_tokens_per_s
        return self.prompt_tokens / max(self.first_s, 1e-6)

    def gaps_s(self) -> list[float]:
        """Between each piece and the next."""
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that were sent at once, and how long it took until the last of them was answered."""

    answers: tuple[TimedAnswer, ...]
    took_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all of them together, their prompts' time included."""
        return sum(answer.tokens for answer in self.answers) / max(self.took_s, 1e-6)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that ``share`` of all are not above; 0 of none."""
    found = sorted(values)
    return found[max(0, math.ceil(share * len(found)) - 1)] if found else 0.0


def prompt(words: int, name: str) -> str:
    """``words`` words behind ``name``: another name, another prompt from its beginning on, so that nothing of it is cached."""
    return " ".join((name, *(_WORDS[number % len(_WORDS)] for number in range(words))))


def words_for(tokens: int, short: tuple[int, int], longer: tuple[int, int]) -> int:
    """How many words make a prompt of about ``tokens``, by two that were counted: (words, tokens) each."""
    per_word = max((longer[1] - short[1]) / (longer[0] - short[0]), 0.5)
    return max(1, round((tokens - (short[1] - per_word * short[0])) / per_word))


def figures(alone: Sequence[Round], full: Sequence[Round], slots: int) -> dict[str, Any]:
    """All that was measured, JSON-able. ``full`` is empty where there is one slot; ``slots`` is how many the pool has."""
    answers = [answer for part in (*alone, *full) for answer in part.answers]
    counted = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    return {
        "tokens": min(answer.tokens for answer in answers), "prompt_tokens": round(percentile(counted, 0.5)) if counted else None,
        "runs": len(alone), "slots": slots, "alone": _load(alone), "full": _load(full) if full else None,
    }  # fmt: skip


def _load(rounds: Sequence[Round]) -> dict[str, Any]:
    answers = [answer for part in rounds for answer in part.answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s()]
    rates = [rate for answer in answers if (rate := answer.prompt_rate) is not None]
    return {
        "requests": len(rounds[0].answers), "runs": len(rounds),
        "first_token_ms_p50": round(percentile((answer.first_s for answer in answers), 0.5) * 1000, 1),
        "between_tokens_ms_p50": round(percentile(gaps, 0.5) * 1000, 2),
        "between_tokens_ms_p99": round(percentile(gaps, 0.99) * 1000, 2),
        "tokens_per_s": round(percentile((answer.tokens_per_s for answer in answers), 0.5), 2),
        "tokens_per_s_total": round(percentile((part.tokens_per_s for part in rounds), 0.5), 2),
        "prompt_tokens_per_s": round(percentile(rates, 0.5), 1) if rates else None,
    }  # fmt: skip


def baseline(found: dict[str, Any], at_ms: int) -> Baseline:
    """``figures`` as what is known of an engine from then on: one request alone."""
    alone = found["alone"]
    behind = "" if found["prompt_tokens"] is None else f" behind a prompt of {found['prompt_tokens']}"
    with_ = f"bench of {found['tokens']} tokens{behind}, {count(found['runs'], 'run')}"
    return Baseline(alone["first_token_ms_p50"], alone["tokens_per_s"], found["runs"], with_, at_ms, found)
