"""What lies in the cache and is no model: parts of downloads, files that no note names, drafts of a crash.

How old they are is counted from when they were first seen as they are, in the cache's own time: a file's mtime is the wall
clock's.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd.core.model_keeping import Leftover
from pool_managerd.models.cache import IMPORTED, MAX_ENTRIES, ModelCache
from pool_managerd.models.fetch_rules import FETCHED
from pool_managerd.models.file_lock import is_locked, try_lock
from pool_managerd.models.note_file import write_note
from pool_managerd.models.part import disk_error
from pool_managerd.models.refs import parse_ref

FOLDERS = (*FETCHED, IMPORTED)
"""Where files of models lie."""
_STAGED = ".folder"
"""What is called so in ``partial/`` is to be a model that is a folder."""
_MAX_BYTES = 4 << 20


class Leftovers:
    """Of one cache. Everything blocks, and raises NodeError."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._seen = cache.books / "leftovers.json"

    def look(self, wanted: Collection[str], *, keep: bool) -> list[Leftover]:
        """What there is; ``wanted`` are references that somebody goes on with where they are not here yet. ``keep`` notes what
        was seen, and since when.
        """
        wanted = [ref for ref in wanted if self._cache.find(ref) is None]
        now, before = self._cache.time.now(), self._known()
        found, known = list[Leftover](), dict[str, list[float]]()
        unreadable = self._cache.unreadable()
        for path, kind, origin in (*self._partial(), *self._drafts(), *self._files(bool(unreadable))):
            with suppress(OSError):  # it is gone meanwhile
                info = (self._cache.root / path).lstat()
                state = [float(info.st_size), float(info.st_mtime_ns // 1_000_000)]
                since = before[path][2] if path in before and before[path][:2] == state else now
                known[path] = [*state, since]
                users = (*_wanted_by(origin, wanted), *self._held(path, kind, unreadable=bool(unreadable)))
                found.append(Leftover(path, kind, info.st_size, max(0.0, now - since), users))
        told = "what it named is not known: fetch that model again, which writes it anew, or delete it"
        found += [Leftover(str(note.relative_to(self._cache.root)), "note", 0, 0.0, (told,)) for note in unreadable]
        if keep and known != before:
            self._write(known)
        return found

    def remove(self, leftover: Leftover) -> int:
        """Delete it, unless somebody has it after all; the bytes that this frees."""
        path = Path(leftover.path)
        if leftover.kind != "download":
            return self._cache.delete(leftover.path)
        lock = (self._cache.root / path).with_suffix(".lock")
        held = try_lock(lock)
        if held is None:
            return 0
        try:
            root = self._cache.root
            there = [str(one.relative_to(root)) for one in _walk(root / path)] if path.suffix == _STAGED else [leftover.path]
            freed = sum(self._cache.delete(one) for one in there)
            self._cache.delete(str(path.with_suffix(".json")))
            return freed
        finally:
            lock.unlink(missing_ok=True)
            os.close(held)

    # --- what there is ---

    def _partial(self) -> Iterator[tuple[str, str, str]]:
        names = set(self._names(self._cache.root / "partial"))
        for name in sorted(names):
            path = Path("partial") / name
            if name.endswith(".part"):
                yield str(path), "download", self._address(path.with_suffix(".json"))
            elif name.endswith(_STAGED):
                yield str(path), "download", ""
            elif f"{path.stem}.part" not in names:
                yield str(path), "temporary", ""

    def _drafts(self) -> Iterator[tuple[str, str, str]]:
        for folder in ("refs", "catalog"):
            for name in sorted(self._names(self._cache.root / folder)):
                if name.endswith(".new"):
                    yield f"{folder}/{name}", "temporary", ""

    def _files(self, unreadable: bool) -> Iterator[tuple[str, str, str]]:
        """Files of models that no note names, of any that there may be."""
        named = {file.path for entry in self._cache.all() for file in entry.files}
        for folder in FOLDERS:
            for path in _walk(self._cache.root / folder):
                relative = str(path.relative_to(self._cache.root))
                if relative not in named:
                    yield relative, "file", f"{relative}"

    def _held(self, path: str, kind: str, *, unreadable: bool) -> Iterator[str]:
        if kind == "file" and unreadable:
            yield "it may be what a note names that cannot be read"
        if kind != "file" and path.startswith("partial/"):
            lock = (self._cache.root / path).with_suffix(".lock")
            if is_locked(lock):
                yield "it is being fetched"

    def _names(self, folder: Path) -> list[str]:
        try:
            return [entry.name for entry, _ in zip(os.scandir(folder), range(MAX_ENTRIES), strict=False)]
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise disk_error(folder, problem) from problem

    def _address(self, note: Path) -> str:
        try:
            with (self._cache.root / note).open("rb") as file:
                return str(json.loads(file.read(_MAX_BYTES)).get("url", ""))
        except (OSError, ValueError, AttributeError):
            return ""

    # --- since when ---

    def _known(self) -> dict[str, list[float]]:
        try:
            with self._seen.open("rb") as file:
                told: dict[str, Any] = json.loads(file.read(_MAX_BYTES))
            return {str(path): [float(one) for one in (size, mtime, since)] for path, (size, mtime, since) in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, known: dict[str, list[float]]) -> None:
        try:
            write_note(self._seen, json.dumps(known))
        except OSError as problem:
            raise disk_error(self._seen, problem) from problem


def bytes_on_disk(cache: ModelCache) -> int:
    """What models and parts of downloads take, without the books. Blocks."""
    models = sum(_size_of(path) for folder in FOLDERS for path in _walk(cache.root / folder))
    partial = cache.root / "partial"
    return models + sum(_size_of(path) for path in _walk(partial) if path.suffix == ".part" or path.parent != partial)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below, bounded; links are neither followed nor told. What cannot be read is passed over."""
    left, count = [folder], 0
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                count += 1
                if count > 100 * MAX_ENTRIES:
                    return
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)


def _size_of(path: Path) -> int:
    try:
        info = path.lstat()
    except OSError:
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _wanted_by(origin: str, wanted: Collection[str]) -> Iterator[str]:
    """``origin`` is the address that it is fetched from, or the path that it has in the cache."""
    if not origin:
        return
    for ref in wanted:
        model = parse_ref(ref)
        place = f"/{model.location}/" if model.scheme == "hf" else model.location
        if place in (origin if "://" in origin else f"/{origin}"):
            yield f"{ref} is wanted, and goes on with it"
            return
