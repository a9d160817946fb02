"""The models that were fetched: what lies where, under one directory, and what of it may be believed.

``refs/`` has a note for each reference, ``partial/`` what is being fetched, ``catalog/`` the books of it all, and the files lie
below ``hf/ORG/REPO/COMMIT`` and ``https/HOST/…``. A file has its name there when it is complete, and not before. The notes are
the catalog (SPEC §6.4): each is whole or not there, and changes come one after the other, those of other processes too.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pool_managerd.errors import NodeError
from pool_managerd.models.cache_time import CacheTime
from pool_managerd.models.entries import CachedFile, Entry, read_entry, write_entry
from pool_managerd.models.holds import Holds
from pool_managerd.models.note_file import remove_note, turn
from pool_managerd.models.part import disk_error

MAX_ENTRIES = 10_000
IMPORTED = "imported"
"""The folder of files that people have brought."""
_OWN = ("refs", "partial", "catalog")
_NEVER = -1
"""No file was changed then."""


class ModelCache:
    """Everything blocks; used from threads. Raises NodeError for what the disk forbids."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._refs = root / "refs"
        self.books = root / "catalog"
        self.time = CacheTime(self.books / "time.json", self._latest)
        self._holds = Holds(self.books)

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
            for name in _OWN:
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
        entry = read_entry(self._note(ref))
        return entry if entry is not None and entry.ref == ref and all(map(self.is_untouched, entry.files)) else None

    def put(self, entry: Entry) -> None:
        """As fetched now; what people have said of it stays. Raises NodeError, also for a note of a later version."""
        with self._turn():
            self._put(entry)

    def register(self, entry: Entry) -> None:
        """As ``put``, of files that are still there: nobody has deleted them meanwhile, and nobody does from now on."""
        with self._turn():
            if gone := next((file.path for file in entry.files if not self.is_untouched(file)), None):
                raise NodeError(f"cannot keep {entry.ref}: {gone} was changed or deleted meanwhile", hint="fetch it again")
            self._put(entry)

    def _put(self, entry: Entry) -> None:
        before = read_entry(self._note(entry.ref))
        known = replace(entry, needed_at=self.time.keep())
        if before is not None and before.ref == entry.ref:
            known = replace(known, pinned=before.pinned, last_used_ms=before.last_used_ms)
        self._write(known)

    def verified(self, ref: str, at_ms: int, wrong: Collection[str] = ()) -> None:
        """All of it was hashed; files that were ``wrong`` are not believed any more, however they look. Raises NodeError."""
        with self._turn():
            if (entry := read_entry(self._note(ref))) is None:
                return
            if wrong:
                files = tuple(replace(one, mtime_ns=_NEVER) if one.path in wrong else one for one in entry.files)
                self._write(replace(entry, files=files))
            else:
                self._write(replace(entry, last_verified_ms=at_ms))

    def retire(self, ref: str, since: float) -> None:
        """Unless somebody has needed it after ``since``, in the cache's own time. Raises NodeError."""
        with self._turn():
            entry = read_entry(self._note(ref))
            if entry is not None and entry.lifecycle == "active" and (entry.needed_at or 0.0) <= since:
                self._write(replace(entry, lifecycle="retired"))

    def need(self, ref: str, *, used: bool = False, pinned: bool | None = None) -> bool:
        """Somebody needs it now: starts with it (``used``), or has said whether it is ``pinned``. False where it is not there, or
        not what was fetched; that can be pinned all the same. Raises NodeError.
        """
        if not self._note(ref).exists():
            return False
        with self._turn():
            entry = self.find(ref) if pinned is None else read_entry(self._note(ref))
            if entry is None:
                return False
            used_ms = time.time_ns() // 1_000_000 if used else entry.last_used_ms
            if used:
                self._holds.take(ref)
            pinned = entry.pinned if pinned is None else pinned
            now = self.time.keep()
            self._write(replace(entry, lifecycle="active", pinned=pinned, last_used_ms=used_ms, needed_at=now))
            return True

    def keep_time(self, wanted: Collection[str] = ()) -> None:
        """Let the next boot go on from here, and notes of an earlier version say that they were needed now; other daemons leave
        the ``wanted`` ones alone, and no others that this one has needed before. Raises NodeError.
        """
        with self._turn():
            now = self.time.keep()
            for entry in (entries := self.all()):
                if entry.needed_at is None:
                    self._write(replace(entry, needed_at=now))
            self._holds.keep_only([entry.ref for entry in entries if entry.ref in wanted])

    def close(self) -> None:
        """This process needs nothing of it any more."""
        self._holds.close()

    def is_needed_elsewhere(self, ref: str) -> bool:
        """By another daemon with the same cache. Raises NodeError."""
        with self._turn():
            return self._holds.is_others(ref)

    def all(self) -> list[Entry]:
        """Sorted by reference; entries whose files have changed or gone, too. Raises NodeError for one of a later version."""
        found = (read_entry(note) for note in self._notes())
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.ref)

    def unreadable(self) -> list[Path]:
        """Notes that say nothing any more: what files they had is not known."""
        return [note for note in self._notes() if read_entry(note) is None]

    def _notes(self) -> list[Path]:
        try:
            notes = [entry.path for entry, _ in zip(os.scandir(self._refs), range(MAX_ENTRIES), strict=False)]
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise disk_error(self._refs, problem) from problem
        return sorted(Path(note) for note in notes if note.endswith(".json"))

    def _latest(self) -> float:
        """The time of the cache where what it was is lost: nothing is older than when it was needed last."""
        return max((entry.needed_at or 0.0 for entry in self.all()), default=0.0)

    def is_untouched(self, file: CachedFile) -> bool:
        try:
            found = (self.root / file.path).lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)

    def remove(self, ref: str) -> int:
        """Forget a reference, and delete those of its files that no other one has; the bytes that this frees."""
        return self.remove_unneeded(ref, None) or 0

    def remove_unneeded(self, ref: str, since: float | None) -> int | None:
        """As ``remove``; nothing happens, and None is the answer, where somebody has needed or pinned it after ``since``, in the
        cache's own time, or another daemon needs it, or it is not there. ``since`` None: whoever needs it.

        Its note goes last: what a crash leaves is found, and not believed.
        """
        if not self._note(ref).exists():
            return None
        with self._turn():
            entry = read_entry(self._note(ref))
            if entry is None or (since is not None and self._is_needed(entry, since)):
                return None
            others = {file.path for other in self.all() if other.ref != entry.ref for file in other.files}
            freed = sum(self.delete(file.path) for file in entry.files if file.path not in others)
            remove_note(self._note(ref))
            self._holds.forget(ref)
            return freed

    def _is_needed(self, entry: Entry, since: float) -> bool:
        return entry.pinned or (entry.needed_at or 0.0) > since or self._holds.is_others(entry.ref)

    def delete(self, path: str) -> int:
        """Delete a file below the cache, and folders that are empty then; its size in bytes. Raises NodeError."""
        found = self.root / path
        try:
            freed = found.lstat().st_size
            found.unlink()
        except FileNotFoundError:
            freed = 0
        except OSError as problem:
            raise disk_error(found, problem) from problem
        self._prune(found.parent)
        return freed

    def _prune(self, folder: Path) -> None:
        """Folders that are empty now, but for those that a download of this moment counts on."""
        with suppress(OSError):
            while self.root in folder.parents and folder.name not in _OWN:
                folder.rmdir()
                folder = folder.parent

    def _note(self, ref: str) -> Path:
        return self._refs / f"{hashlib.sha256(ref.encode()).hexdigest()[:32]}.json"

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """To read the catalog and change it by what was read."""
        try:
            self.books.mkdir(mode=0o700, exist_ok=True)  # an earlier version has made the cache
            with turn(self.books / "lock"):
                yield
        except OSError as problem:
            raise disk_error(self.books, problem) from problem

    def _write(self, entry: Entry) -> None:
        write_entry(self._note(entry.ref), entry)
