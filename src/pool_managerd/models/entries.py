"""The catalog's entries (SPEC §6.4): what was fetched, as its note has it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pool_managerd.errors import NodeError
from pool_managerd.models.note_file import write_note

SCHEMA = 1
_MAX_NOTE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CachedFile:
    """``path`` is below the cache's directory; ``sha256`` (hex) is what was received, and what it had to be where ``expected``.
    A file with another size or mtime is not what was fetched any more.
    """

    path: str
    size: int
    sha256: str
    expected: bool
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that was fetched: ``ref`` is its id, ``files`` all parts of it, the first one first.

    ``folder`` is what an engine is given where the model is one, below the cache's directory; its first ``weights`` files are
    the weights.

    ``lifecycle`` is active, or retired: nobody has needed it for as long as models are kept. ``last_used_ms`` is when a start
    had it last, ``last_verified_ms`` when all of it was hashed and right: unix times, to be shown. ``needed_at`` is when somebody
    needed it last, in seconds of the cache's own time; None where an earlier version has written the note.
    """

    ref: str
    source: str
    fetched_at_ms: int
    files: tuple[CachedFile, ...]
    folder: str = ""
    weights: int = 0
    lifecycle: str = "active"
    pinned: bool = False
    last_used_ms: int | None = None
    last_verified_ms: int | None = None
    needed_at: float | None = None

    @property
    def path(self) -> str:
        """What an engine is given: the folder, or the first file. Below the cache's directory."""
        return self.folder or self.files[0].path

    @property
    def parts(self) -> tuple[CachedFile, ...]:
        """Those that hold the model: of a folder its weights."""
        return self.files[: self.weights] if self.folder else self.files

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def verified(self) -> bool:
        """Whether all of it is what somebody said beforehand."""
        return all(file.expected for file in self.files)

    @property
    def digest(self) -> str:
        return ",".join(f"sha256:{file.sha256}" for file in self.parts)


def write_entry(note: Path, entry: Entry) -> None:
    """Whole, or not at all. Blocks. Raises OSError."""
    write_note(note, json.dumps({"schema": SCHEMA, **asdict(entry)}))


def read_entry(note: Path) -> Entry | None:
    """None where it says nothing any more. Raises NodeError CATALOG_TOO_NEW for one of a later version. Blocks."""
    try:
        with note.open("rb") as file:
            told: dict[str, Any] = json.loads(file.read(_MAX_NOTE_BYTES))
        schema = told.pop("schema", SCHEMA)
        if schema != SCHEMA:
            raise _too_new(note, schema)
        files = tuple(CachedFile(**one) for one in told.pop("files"))
        entry = Entry(**told, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    paths = [file.path for file in files] + ([entry.folder] if entry.folder else [])
    return entry if files and _is_sound(entry) and all(map(_is_below, paths)) else None


def _is_sound(entry: Any) -> bool:
    """A harmed note may be JSON all the same; nothing is decided by what is not of its kind."""
    numbers = (entry.fetched_at_ms, *(number for file in entry.files for number in (file.size, file.mtime_ns)))
    times = (entry.needed_at, entry.last_used_ms, entry.last_verified_ms)
    return (
        all(isinstance(number, int) for number in numbers)
        and all(at is None or (isinstance(at, int | float) and isfinite(at)) for at in times)
        and isinstance(entry.pinned, bool)
        and isinstance(entry.weights, int)
        and all(isinstance(text, str) for text in (entry.ref, entry.source, entry.lifecycle, entry.folder))
    )


def _too_new(note: Path, schema: object) -> NodeError:
    return NodeError(
        f"cannot read {note}: a later version has written it (schema {str(schema)[:20]}, this one knows {SCHEMA})",
        code="CATALOG_TOO_NEW", retriable=False,
        hint="run that version, or have models.cache_dir elsewhere; nothing in it is changed",
    )  # fmt: skip


def _is_below(path: str) -> bool:
    """Nobody but this daemon writes notes; a path that leads out of the cache would have its file deleted."""
    parts = Path(path).parts
    return bool(parts) and ".." not in parts and not Path(path).is_absolute()
