"""What of other tools' models was hashed and is used: remembered by reference, as long as it is the same file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool_managerd.errors import PoolError
from pool_managerd.models.byte_reader import identity
from pool_managerd.models.cache import ModelCache

_MAX_NOTE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class UsedFile:
    """``place`` is where its tool has it, below ``root``; ``identity`` is that of the file whose sha256 (hex) was found."""

    place: str
    root: str
    size: int
    sha256: str
    identity: tuple[int, ...]

    def is_same(self) -> bool:
        """Whether it is that file still. Blocks."""
        try:
            return identity(os.stat(self.place)) == self.identity  # noqa: PTH116 - asked for each start
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Used:
    """A model that another tool has, hashed: ``ref`` is its id, ``files`` all parts of it."""

    ref: str
    tool: str
    source: str
    used_at_ms: int
    files: tuple[UsedFile, ...]

    @property
    def digest(self) -> str:
        return ",".join(f"sha256:{file.sha256}" for file in self.files)


class UsedNotes:
    """In memory, and in ``elsewhere/`` of ``cache`` where that can be written: a restart hashes nothing anew then. Blocks."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache, self._folder = cache, cache.root / "elsewhere"
        self._known: dict[str, Used] = {}

    def find(self, ref: str) -> Used | None:
        """What is used for a reference's id, as long as its files are those that were hashed."""
        used = self._known.get(ref) or self._read(ref)
        if used is None or used.ref != ref or not all(file.is_same() for file in used.files):
            return None
        self._known[ref] = used
        return used

    def put(self, used: Used) -> None:
        self._known[used.ref] = used
        note = self._note(used.ref)
        with suppress(OSError, PoolError):  # it is hashed again after a restart then
            self._cache.prepare()
            self._folder.mkdir(mode=0o700, exist_ok=True)
            draft = note.with_suffix(f".{os.getpid()}.new")
            draft.write_text(json.dumps(asdict(used)), "utf-8")
            draft.replace(note)

    def _note(self, ref: str) -> Path:
        return self._folder / f"{hashlib.sha256(ref.encode()).hexdigest()[:32]}.json"

    def _read(self, ref: str) -> Used | None:
        try:
            folder = self._folder.lstat()
            if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.geteuid() or folder.st_mode & 0o022:
                return None  # others could say there what no hash has shown
            with self._note(ref).open("rb") as file:
                told: dict[str, Any] = json.loads(file.read(_MAX_NOTE_BYTES))
            files = tuple(UsedFile(**one | {"identity": tuple(one["identity"])}) for one in told.pop("files"))
            return Used(**told, files=files) if files else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
