"""The caches of an engine's slots on disk, between one launch and the next: what a file is good for, which ones there is room
for, what is worth saving, and when a restored one is believed.

An engine reads a file of another model of the same shape without a word, and answers nonsense from then on: a file's name says
by which model, build, context and flags it was made, and it is only ever given back to an engine that has all of them. A file
is whole when it has its name: it is written under another one, and renamed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from pool_managerd.core.narration import size

PARTS: Mapping[str, str] = {
    "model": "model file", "engine": "engine version", "context": "context", "slots": "number of slots",
    "cache": "types of the cache", "flags": "flags",
}  # fmt: skip
"""What a saved cache depends on, and how people call it."""

PROVEN_SHARE = 0.9
"""So much of a restored prompt must not be computed again: an engine may begin at a batch or a checkpoint before its end."""
SPARE_BYTES = 1 << 30
"""Is left free on the disk: a full one harms more than a prompt that is read again."""

MAX_LOST_CHARS = 1000
"""So much of what was lost is told in a status; how much more there is stands behind it."""

_DIGEST_CHARS = 12
_MOST_SLOTS = 10_000
"""More do not fit into a name."""
_NAME = re.compile(rf"slot-(\d{{1,4}})-(\d{{1,9}})((?:-[0-9a-f]{{{_DIGEST_CHARS}}}){{{len(PARTS)}}})\.kv")


@dataclass(frozen=True, slots=True)
class SlotSaving:
    """``directory`` is where an engine writes the caches of its slots and reads them, ``key`` by each of `PARTS` what they
    depend on. ``unable``: why this engine saves none.
    """

    directory: str = ""
    key: Mapping[str, str] = field(default_factory=dict)
    unable: str = ""

    def to_json(self) -> dict[str, object]:
        return {"directory": self.directory, "key": dict(self.key)}

    @classmethod
    def from_json(cls, data: object) -> SlotSaving | None:
        """None for what is none; a key of another release has parts that do not match any file."""
        if not isinstance(data, Mapping):
            return None
        directory, key = data.get("directory"), data.get("key")
        if not isinstance(directory, str) or not isinstance(key, Mapping):
            return None
        return cls(directory, {str(name): str(value) for name, value in key.items()})


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot as its engine tells it. ``tokens`` in its cache, None where it does not say; ``busy`` with a request."""

    slot: int
    tokens: int | None
    busy: bool


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A file in a pool's directory. ``written_at`` is a unix time; it orders files, and nothing else."""

    pool_id: str
    name: str
    size_bytes: int
    written_at: float


@dataclass(frozen=True, slots=True)
class Restored:
    """What a launch was given back: so many slots, with ``tokens`` in all; ``lost`` says what was not, and why."""

    slots: int = 0
    tokens: int = 0
    lost: str = ""

    def telling(self, losses: Sequence[str]) -> Restored:
        """With ``losses`` in ``lost``, each once, as many of them as fit."""
        words, told = list(dict.fromkeys(losses)), list[str]()
        while len(told) < len(words) and (not told or len("; ".join([*told, words[len(told)]])) <= MAX_LOST_CHARS):
            told.append(words[len(told)])
        left = len(words) - len(told)
        return replace(self, lost="; ".join([*told, f"{left} more"] if left else told))


@dataclass(frozen=True, slots=True)
class Room:
    """Which files must go for another one, oldest first; ``why_not`` says why that would not do."""

    remove: tuple[SlotFile, ...] = ()
    why_not: str = ""


def directory_of(runtime_dir: str, pool_id: str) -> str:
    """Where the engine of ``pool_id`` saves its slots: below what it may write and a later launch may use again."""
    return f"{runtime_dir}/cache/{pool_id}/slots"


def name_of(key: Mapping[str, str], slot: int, tokens: int) -> str:
    """What the saved cache of ``slot`` is called."""
    return f"slot-{slot}-{tokens}-{'-'.join(_digests(key))}.kv"


def temporary_name(epoch: int, slot: int) -> str:
    """What it is called until it is whole."""
    return f"saving-{epoch}-{slot}.tmp"


def slot_of(name: str) -> tuple[int, int] | None:
    """(slot, tokens) of a file that is whole; None for any other name."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def is_leftover(name: str) -> bool:
    """A save of ours never gives a file this name, or not in the end: it was not finished, or put there by somebody else, as
    what is of a slot that an engine with so many slots does not have.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return True
    digest = found[3][1:].split("-")[list(PARTS).index("slots")]
    return int(found[1]) >= _slots_by_digest().get(digest, 0)


def differences(key: Mapping[str, str], name: str) -> tuple[str, ...]:
    """What is another now than when the file was saved, in words; empty: it may be restored."""
    found = _NAME.fullmatch(name)
    if found is None:
        return ("file",)
    return tuple(PARTS[part] for part, old, new in zip(PARTS, found[3][1:].split("-"), _digests(key), strict=True) if old != new)


def restorable(files: Iterable[SlotFile], key: Mapping[str, str], slots: int) -> dict[int, SlotFile]:
    """By slot, the newest file that may be restored into it."""
    found: dict[int, SlotFile] = {}
    for file in sorted(files, key=lambda file: file.written_at):
        place = slot_of(file.name)
        if place is not None and place[0] < slots and not differences(key, file.name):
            found[place[0]] = file
    return found


def holds_enough(state: SlotState, min_tokens: int) -> bool:
    """Whether its cache is worth a file; of one that does not say how much it holds, its file tells."""
    return state.tokens is None or state.tokens >= min_tokens


def worth_saving(state: SlotState, min_tokens: int) -> bool:
    """A slot that is at rest and holds enough."""
    return not state.busy and holds_enough(state, min_tokens)


def room_for(
    need_bytes: int, files: Iterable[SlotFile], *, budget_bytes: int, free_bytes: int, reserved_bytes: int = 0,
    fixed_bytes: int = 0,
) -> Room:  # fmt: skip
    """What must go for ``need_bytes`` more, within the budget and on the disk, oldest first.

    ``reserved_bytes`` are those of files that are being written, ``fixed_bytes`` those of files that may not go.
    """
    kept = sorted(files, key=lambda file: (file.written_at, file.pool_id, file.name))
    need = need_bytes + reserved_bytes
    if need + fixed_bytes > budget_bytes:
        beside = f", {size(fixed_bytes)} of it taken by other slots of this stop" if fixed_bytes else ""
        allows = f"slot_cache.disk_bytes allows {size(budget_bytes)}{beside}"
        return Room(why_not=f"it needs {size(need_bytes)} of disk, and {allows}")
    used, free, gone = fixed_bytes + sum(file.size_bytes for file in kept), free_bytes, list[SlotFile]()
    while kept and (used + need > budget_bytes or free < need + SPARE_BYTES):
        oldest = kept.pop(0)
        used, free = used - oldest.size_bytes, free + oldest.size_bytes
        gone.append(oldest)
    if free < need + SPARE_BYTES:
        return Room(why_not=f"the disk has {size(free_bytes)} free, and it needs {size(need_bytes)} beside {size(SPARE_BYTES)}")
    return Room(tuple(gone))


def proven(tokens: int, cached: int) -> bool:
    """Whether an engine that was given ``tokens`` back had them when it was asked the same again."""
    return cached >= tokens * PROVEN_SHARE


def _digests(key: Mapping[str, str]) -> list[str]:
    return [_digest(key.get(part, "")) for part in PARTS]


def _digest(value: str) -> str:
    return hashlib.blake2b(value.encode(), digest_size=_DIGEST_CHARS // 2).hexdigest()


@cache
def _slots_by_digest() -> Mapping[str, int]:
    return {_digest(str(slots)): slots for slots in range(1, _MOST_SLOTS + 1)}
