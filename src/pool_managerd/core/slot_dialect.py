"""How an engine is asked to save and restore the caches of its slots: what is sent to it, and what its answers say.

Values and texts alone; whoever asks does so over HTTP (supervision/slot_calls.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pool_managerd.core.question import Question
from pool_managerd.core.slot_cache import SlotState


class SlotDialect(Protocol):
    """One engine's. Readers raise ValueError for an answer that is not what was asked for."""

    def head_bytes(self, tokens: int) -> int:
        """So much of a file's beginning tells which ``tokens`` it has."""
        ...

    def list_slots(self) -> Question: ...
    def slots(self, answer: Any) -> tuple[SlotState, ...]: ...
    def save(self, slot: int, name: str) -> Question: ...
    def saved(self, answer: Any) -> tuple[int, int]:
        """(tokens, bytes)."""
        ...

    def restore(self, slot: int, name: str) -> Question: ...
    def restored(self, answer: Any) -> int:
        """Tokens, as the engine says; whether it has them is seen by ``cached``."""
        ...

    def tokens(self, head: bytes, count: int) -> tuple[int, ...]:
        """The ``count`` tokens that a saved file was made of."""
        ...

    def ask_again(self, slot: int, tokens: Sequence[int]) -> Question:
        """The same prompt once more, with as little behind it as can be, in this slot."""
        ...

    def cached(self, answer: Any) -> int:
        """How many of its tokens the engine had."""
        ...
