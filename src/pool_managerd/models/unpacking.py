"""The files of a model out of the layers that they were packaged in: found first, and then written, those that are needed alone.

Nothing of an archive but names and bytes is taken: files are made here, read-only and of this user, below a folder of its own.
"""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.archive_reader import ArchiveError, Content, Member, StoppedError, ZstdError, opened
from pool_managerd.models.artifact_files import needed_below, zstd_refused
from pool_managerd.models.hub import HubFile, HubListing
from pool_managerd.models.layered import Found, Layered
from pool_managerd.models.part import disk_error, sync_directory
from pool_managerd.models.remote import RemoteFile, RemoteModel, chosen_in, models_in
from pool_managerd.models.repository import check_code, may_name_code

_CHECKED_BYTES = 256 << 20
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where each file of a model is in its layers, by its path in the end. The first ``weights`` are the model; of a GGUF model
    that is all of them, and it is no folder.
    """

    files: Mapping[str, Found]
    weights: int
    is_folder: bool

    @property
    def size_bytes(self) -> int:
        return sum(found.member.size for found in self.files.values())


@dataclass(frozen=True, slots=True)
class Written:
    """One file of it, as it is on the disk now; ``layer`` is where it was."""

    path: str
    size: int
    sha256: str
    mtime_ns: int
    layer: RemoteFile


class Unpacking:
    """Of one model, whose layers lie in ``layers`` under their names. ``tell`` hears how many bytes of them were read, then how
    many were written. Everything blocks, until ``stop`` is set. Raises PoolError.
    """

    def __init__(
        self, remote: RemoteModel, layers: Path, policy: PolicyConfig, stop: threading.Event, tell: Callable[[int, int], None]
    ) -> None:
        self._remote, self._layers, self._policy, self._stop, self._tell = remote, layers, policy, stop, tell

    def choose(self) -> Chosen:
        """What there is that an engine needs; what the policy has against it is said before a byte is written."""
        layered, before, total = Layered(self._remote.inside), 0, self._remote.size_bytes or 0
        for number, layer in enumerate(self._remote.files):
            if layer.is_packed:
                with self._reading(layer, before, total) as members:
                    layered.add(number, (member for member, _ in members))
            else:
                layered.add(number, [Member(0, layer.name, "file", layer.size or 0)])
            before += layer.size or 0
            self._tell(before, total)
        found = layered.files()
        if not found:
            raise self._nothing(layered.tops)
        listing = HubListing(self._remote.source, tuple(HubFile(path, one.member.size, None) for path, one in found.items()))
        top, weights, beside, is_folder = self._needed(listing)
        self._check_names([file.path for file in (*weights, *beside)])
        return Chosen({file.path: found[top + file.path] for file in (*weights, *beside)}, len(weights), is_folder)

    def write(self, chosen: Chosen, folder: Path, fits: Callable[[int], None]) -> list[Written]:
        """All of ``chosen``, below ``folder``, which is empty; on the disk when this returns. ``fits`` is asked for room."""
        writing = _Writing(folder, chosen.size_bytes, fits, self._tell)
        try:
            for number, layer in enumerate(self._remote.files):
                wanted = _wanted(chosen.files, number)
                if wanted and not layer.is_packed:
                    (paths,) = wanted.values()
                    writing.link(self._layers / layer.name, paths, layer)
                elif wanted:
                    with self._reading(layer, 0, 0, quiet=True) as members:
                        writing.copy(members, wanted, layer)
            writing.sync()
            by_path = {one.path: one for one in writing.written}
            for path in filter(may_name_code, by_path):
                check_code(self._remote.ref, path, (folder / path).read_bytes(), self._policy)
        except OSError as problem:
            raise disk_error(folder, problem) from problem
        return [by_path[path] for path in chosen.files]

    # --- inside ---

    def _needed(self, listing: HubListing) -> tuple[str, list[HubFile], list[HubFile], bool]:
        model, ggufs = self._remote.ref, models_in(listing)
        if not ggufs:
            return (*needed_below(model, listing, self._policy), True)
        if len(ggufs) > 1:
            names = sorted(files[0].path for files in ggufs.values())
            raise SpecError(f"cannot fetch {model.id}: it has {len(names)} models: {', '.join(names[:_SHOWN])}", status=422)
        (files,) = ggufs.values()
        parts = chosen_in(listing, replace(model, file=min(file.path for file in files)))
        folder, slash, _ = parts[0].path.rpartition("/")
        top = folder + slash
        return top, [replace(part, path=part.path.removeprefix(top)) for part in parts], [], False

    def _check_names(self, paths: Sequence[str]) -> None:
        """Of two that a disk may take for one it would be chance which is there in the end."""
        seen = dict[str, str]()
        for path in paths:
            other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
            if other != path:
                raise self._refused(f"some disks cannot tell {path!r} from {other!r}, which is in it, too")

    @contextmanager
    def _reading(
        self, layer: RemoteFile, before: int, total: int, *, quiet: bool = False
    ) -> Iterator[Iterator[tuple[Member, Content]]]:
        path = self._layers / layer.name

        def tell(done: int) -> None:
            if not quiet:
                self._tell(before + done, total)

        try:
            with opened(path, self._stop, tell) as members:
                yield members
        except ZstdError as problem:
            raise zstd_refused(self._remote.ref, f"its layer sha256:{layer.sha256}") from problem
        except ArchiveError as problem:
            raise self._refused(f"its layer sha256:{layer.sha256} cannot be unpacked: {problem}") from problem
        except StoppedError as problem:
            raise NodeError(f"cannot fetch {self._remote.ref.id}: it was cancelled while it was unpacked") from problem
        except OSError as problem:
            raise disk_error(path, problem) from problem

    def _nothing(self, tops: Iterable[str]) -> SpecError:
        if not self._remote.inside:
            return self._refused("there are no files in it")
        have = ", ".join(f"/{top}" for top in sorted(tops)) or "nothing else"
        return self._refused(f"it is an image without a model in /{self._remote.inside}", f"copy the model there; it has: {have}")

    def _refused(self, why: str, hint: str | None = None) -> SpecError:
        return SpecError(f"cannot fetch {self._remote.ref.id}: {why}", status=422, hint=hint or "have it packaged anew")


def _wanted(files: Mapping[str, Found], layer: int) -> dict[int, list[str]]:
    """By the number of a member in that layer what is made of it: a link in an image makes it several files."""
    wanted = dict[int, list[str]]()
    for path, found in files.items():
        if found.layer == layer:
            wanted.setdefault(found.member.number, []).append(path)
    return wanted


class _Writing:
    """Of ``total`` bytes in all."""

    def __init__(self, folder: Path, total: int, fits: Callable[[int], None], tell: Callable[[int, int], None]) -> None:
        self._folder, self._total, self._fits, self._tell = folder, total, fits, tell
        self._done, self._checked = 0, 0
        self.written: list[Written] = []

    def copy(self, members: Iterable[tuple[Member, Content]], wanted: Mapping[int, Sequence[str]], layer: RemoteFile) -> None:
        left = set(wanted)
        for member, content in members:
            if member.number in left:
                first, *others = wanted[member.number]
                sha256 = self._write(self._place(first), content())
                self._made([first], sha256, layer)
                for path in others:
                    os.link(self._folder / first, self._place(path))
                self._made(others, sha256, layer)
                self._done += member.size * len(others)
                left.discard(member.number)
            if not left:
                return
        raise ArchiveError("it is not what it was a moment ago")

    def link(self, source: Path, paths: Sequence[str], layer: RemoteFile) -> None:
        """A layer that is a file by itself: it is on the disk already, and verified."""
        for path in paths:
            os.link(source, self._place(path))
        self._made(paths, layer.sha256 or "", layer)
        self._done += (layer.size or 0) * len(paths)

    def sync(self) -> None:
        for folder, _, _ in os.walk(self._folder):
            sync_directory(Path(folder))

    def _place(self, path: str) -> Path:
        """It stays in the folder: in no name of a path there is ``..``, and nothing but directories and files is made below."""
        place = self._folder / path
        for folder in reversed(place.relative_to(self._folder).parents[:-1]):
            (self._folder / folder).mkdir(mode=0o755, exist_ok=True)
            (self._folder / folder).chmod(0o755)
        return place

    def _write(self, place: Path, content: Iterator[bytes]) -> str:
        digest = hashlib.sha256()
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for block in content:
                if self._done >= self._checked:
                    self._fits(self._total - self._done)
                    self._checked = self._done + _CHECKED_BYTES
                digest.update(block)
                left = memoryview(block)
                while left:
                    left = left[os.write(fd, left) :]
                self._done += len(block)
                self._tell(self._done, self._total)
            os.fchmod(fd, 0o444)  # engines have users of their own
            os.fsync(fd)
        finally:
            os.close(fd)
        return digest.hexdigest()

    def _made(self, paths: Iterable[str], sha256: str, layer: RemoteFile) -> None:
        for path in paths:
            info = (self._folder / path).lstat()
            self.written.append(Written(path, info.st_size, sha256, info.st_mtime_ns, layer))
