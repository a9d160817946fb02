"""The models that were fetched: what lies where, under one directory, and what of it may be believed.

``refs/`` has a note for each reference, ``partial/`` what is being fetched, and the files lie below ``hf/ORG/REPO/COMMIT`` and
``https/HOST/…``. A file has its name there when it is complete, and not before.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool_managerd.errors import NodeError
from pool_managerd.models.part import disk_error

MAX_ENTRIES = 10_000
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
    """

    ref: str
    source: str
    fetched_at_ms: int
    files: tuple[CachedFile, ...]
    folder: str = ""
    weights: int = 0

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


class ModelCache:
    """Everything blocks; used from threads. Raises NodeError for what the disk forbids."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._refs = root / "refs"

    def prepare(self) -> None:
        """Make the directory: others may read models, and nobody else may put any there."""
        try:
            self.make_folder(self.root)
            found = self.root.stat()
            if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise NodeError(
                    f"cannot use {self.root} for models: other users could change what is in it", code="DIRECTORY_NOT_OURS",
                    retriable=False, hint=f"chown {os.geteuid()} {self.root} && chmod go-w {self.root}",
                )  # fmt: skip
            for name in ("refs", "partial"):
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as problem:
            raise disk_error(self.root, problem) from problem

    def make_folder(self, folder: Path) -> None:
        """And those on the way to it: engines have users of their own, who may enter what is made here."""
        try:
            missing = [one for one in (folder, *folder.parents) if not one.is_dir()]
            for one in reversed(missing):
                one.mkdir(exist_ok=True)
                one.chmod(0o755)
        except OSError as problem:
            raise disk_error(folder, problem) from problem

    def place(self, folder: str, name: str) -> Path:
        """Where a file of a model lies."""
        return self.root / folder / name

    def partial(self, final: Path, sha256: str | None) -> Path:
        """Where it is written until it is complete: the same for everybody who fetches it, whichever commit they have it from."""
        named = sha256 or str(final.relative_to(self.root))
        return self.root / "partial" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.part"

    # --- notes ---

    def find(self, ref: str) -> Entry | None:
        """What was fetched for a reference's id, as long as its files are those that were."""
        entry = self._read(self._note(ref))
        return entry if entry is not None and entry.ref == ref and all(map(self.is_untouched, entry.files)) else None

    def put(self, entry: Entry) -> None:
        note = self._note(entry.ref)
        draft = note.with_suffix(f".{os.getpid()}.new")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(asdict(entry), file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(note)
        except OSError as problem:
            raise disk_error(note, problem) from problem

    def all(self) -> list[Entry]:
        """Sorted by reference; entries whose files have changed or gone, too."""
        try:
            notes = [entry.path for entry, _ in zip(os.scandir(self._refs), range(MAX_ENTRIES), strict=False)]
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise disk_error(self._refs, problem) from problem
        found = (self._read(Path(note)) for note in notes if note.endswith(".json"))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.ref)

    def is_untouched(self, file: CachedFile) -> bool:
        try:
            found = (self.root / file.path).lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)

    def remove(self, ref: str) -> int:
        """Forget a reference, and delete those of its files that no other one has; the bytes that this frees."""
        entry = self._read(self._note(ref))
        if entry is None:
            return 0
        others = {file.path for other in self.all() if other.ref != entry.ref for file in other.files}
        freed = 0
        try:
            self._note(ref).unlink(missing_ok=True)
            for file in entry.files:
                path = self.root / file.path
                if file.path not in others:
                    freed += path.lstat().st_size if os.path.lexists(path) else 0
                    path.unlink(missing_ok=True)
                    self._prune(path.parent)
        except OSError as problem:
            raise disk_error(self.root, problem) from problem
        return freed

    def _prune(self, folder: Path) -> None:
        """Folders that are empty now."""
        with suppress(OSError):
            while folder != self.root and self.root in folder.parents:
                folder.rmdir()
                folder = folder.parent

    def _note(self, ref: str) -> Path:
        return self._refs / f"{hashlib.sha256(ref.encode()).hexdigest()[:32]}.json"

    def _read(self, note: Path) -> Entry | None:
        try:
            with note.open("rb") as file:
                told: dict[str, Any] = json.loads(file.read(_MAX_NOTE_BYTES))
            files = tuple(CachedFile(**one) for one in told.pop("files"))
            entry = Entry(**told, files=files)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        paths = [file.path for file in files] + ([entry.folder] if entry.folder else [])
        return entry if all(map(_is_below, paths)) and files else None


def _is_below(path: str) -> bool:
    """Nobody but this daemon writes notes; a path that leads out of the cache would have its file deleted."""
    parts = Path(path).parts
    return bool(parts) and ".." not in parts and not Path(path).is_absolute()
