"""What is known of models that were not fetched yet, kept so that nobody is asked for it again: not their bytes, their shapes."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree

from pydantic import TypeAdapter

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.models.remote import RemoteFile, RemoteModel

MAX_NOTES = 256
MAX_NOTE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AheadFile:
    """``size`` and ``sha256`` are None, and ``etag`` empty, where they are not said."""

    name: str
    size: int | None
    sha256: str | None = None
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A model as it was found elsewhere. ``shape`` is None where its headers do not tell it, ``problem`` why no engine could
    use it; ``config`` is its config.json, ``folder`` and ``source`` are those of `RemoteModel`.
    """

    ref: str
    folder: str
    source: str
    files: tuple[AheadFile, ...]
    shape: ModelShape | None = None
    config: str = ""
    problem: str = ""

    @property
    def is_folder(self) -> bool:
        return bool(self.config)

    @property
    def size_bytes(self) -> int | None:
        """None where nobody says it."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def is_of(self, remote: RemoteModel) -> bool:
        """Whether nothing that is said of ``remote`` tells it from what this was read from."""
        if (self.folder, self.source, len(self.files)) != (remote.folder, remote.source, len(remote.files)):
            return False
        return all(map(_alike, self.files, remote.files))


def _alike(mine: AheadFile, its: RemoteFile) -> bool:
    known = None not in (mine.sha256, its.sha256)
    return mine.name == its.name and its.size in (None, mine.size) and (not known or mine.sha256 == its.sha256)


@cache
def _adapter() -> TypeAdapter[Ahead]:
    return TypeAdapter(Ahead)


class AheadNotes:
    """One file for each reference below ``folder``, the latest few of them. Everything blocks; nothing raises: a note that is
    lost is read anew.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Ahead] = {}

    def find(self, ref: str) -> Ahead | None:
        found = self._known.get(ref) or self._read(ref)
        if found is not None:
            self._remember(found)
        return found

    def put(self, ahead: Ahead) -> None:
        self._remember(ahead)
        text = _adapter().dump_json(ahead)
        path = self._path(ahead.ref)
        with suppress(OSError):
            if len(text) <= MAX_NOTE_BYTES and self._folder.parent.is_dir():
                self._folder.mkdir(mode=0o700, exist_ok=True)
                self._drop_oldest()
                draft = path.with_suffix(f".{os.getpid()}.new")
                draft.write_bytes(text)
                draft.replace(path)

    def forget(self, ref: str) -> None:
        self._known.pop(ref, None)
        with suppress(OSError):
            self._path(ref).unlink(missing_ok=True)
            rmtree(self._path(ref).with_suffix(""), ignore_errors=True)

    def folder_of(self, ahead: Ahead) -> Path | None:
        """A folder with its config.json alone; None where it cannot be made."""
        folder = self._path(ahead.ref).with_suffix("")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(exist_ok=True)
            draft = folder / f".{os.getpid()}.{threading.get_ident()}.new"
            draft.write_text(ahead.config, "utf-8")
            draft.replace(folder / "config.json")
        except OSError:
            return None
        return folder

    def _remember(self, ahead: Ahead) -> None:
        if len(self._known) >= MAX_NOTES:
            self._known = {}
        self._known[ahead.ref] = ahead

    def _read(self, ref: str) -> Ahead | None:
        try:
            with self._path(ref).open("rb") as file:
                found = _adapter().validate_json(file.read(MAX_NOTE_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return found if found.ref == ref and found.files else None

    def _drop_oldest(self) -> None:
        notes = sorted(self._folder.glob("*.json"), key=lambda note: note.lstat().st_mtime_ns)
        for note in notes[: max(0, len(notes) - MAX_NOTES + 1)]:
            note.unlink(missing_ok=True)
            rmtree(note.with_suffix(""), ignore_errors=True)

    def _path(self, ref: str) -> Path:
        return self._folder / f"{hashlib.sha256(ref.encode()).hexdigest()[:32]}.json"
