"""A model file of one's own, brought into the cache under a name: cloned where the disk can do that, else copied; hashed."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.byte_reader import identity
from pool_managerd.models.cache import IMPORTED, ModelCache
from pool_managerd.models.digests import BLOCK_BYTES, DigestCache
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.fetch_rules import FETCHED
from pool_managerd.models.gguf import is_gguf
from pool_managerd.models.gguf_header import GgufHeader, read_gguf_header
from pool_managerd.models.gguf_parts import other_parts
from pool_managerd.models.part import disk_error
from pool_managerd.models.progress import Progress
from pool_managerd.models.refs import ModelRef, parse_ref
from pool_managerd.models.room import Room
from pool_managerd.models.thread_work import in_thread

MAX_PATH_CHARS = 4096
FLUSH_BYTES = 64 << 20
_FICLONE = 0x40049409
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_DRAFT = re.compile(r"import-[0-9a-f]{16}\.part")


@dataclass(frozen=True, slots=True)
class Import:
    """What is to be brought: ``path`` on this machine, the name ``ref`` for it, and its ``digests`` where they are known."""

    path: Path
    ref: ModelRef
    digests: tuple[str, ...] = ()


def import_of(path: str, name: str | None, digests: Sequence[str] = ()) -> Import:
    """``name``: a reference (local:NAME, hf:ORG/REPO/FILE) or a plain name; absent, what the file is called. Raises SpecError."""
    if not path.startswith("/") or len(path) > MAX_PATH_CHARS or not path.isprintable():
        raise SpecError("cannot import it: its path must be absolute, and printable")
    where, wanted = Path(path), tuple(digest.lower() for digest in digests)
    if name is None:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", _PART.sub("", where.name.removesuffix(".gguf"))).lstrip("._-")[:128]
        return Import(where, parse_ref(f"local:{stem or 'model'}"), wanted)
    ref = parse_ref(name if ":" in name else f"local:{name}")
    if ref.scheme not in ("local", *FETCHED) or (ref.scheme == "hf" and not (ref.file or ref.quantisation)):
        raise SpecError(
            f"cannot import a model as {ref.id}", hint="name it local:NAME, or as pools have it: hf:ORG/REPO/FILE.gguf, https://…"
        )
    return Import(where, ref, wanted)


class Importer:
    """``digests`` learns what was hashed."""

    def __init__(self, cache: ModelCache, room: Room, digests: DigestCache) -> None:
        self._cache, self._room, self._digests = cache, room, digests

    async def run(self, wanted: Import, progress: Progress) -> Entry:
        """Cancelled or failed, it leaves nothing. Raises PoolError."""
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        return await in_thread(lambda: self._run(wanted, _Copying(stop, report)), stop)

    def _run(self, wanted: Import, copying: _Copying) -> Entry:
        self._cache.prepare()
        self._sweep()
        with ExitStack() as opened:
            paths = _parts_of(wanted.path)
            sources = [opened.enter_context(_source(path)) for path in paths]
            copying.total = sum(os.fstat(fd).st_size for fd in sources)
            self._refuse_other(wanted, copying.total)
            drafts = [opened.enter_context(self._draft(fd, path, copying)) for fd, path in zip(sources, paths, strict=True)]
            sums = tuple(f"sha256:{draft.sha256}" for draft in drafts)
            if wanted.digests and sums != wanted.digests:
                raise _refused(
                    wanted.path,
                    f"digest mismatch: expected {','.join(wanted.digests)}, found {','.join(sums)}",
                    "DIGEST_MISMATCH",
                )
            before = self._cache.find(wanted.ref.id)
            if before is not None and before.digest != ",".join(sums):
                raise _name_taken(wanted.ref, before)
            return before or self._keep(wanted, drafts)

    def _keep(self, wanted: Import, drafts: Sequence[_Draft]) -> Entry:
        together = hashlib.sha256(",".join(draft.sha256 for draft in drafts).encode()).hexdigest()[:32]
        names = _names(wanted.path.name, len(drafts))
        files, known = list[CachedFile](), {file.path: file for entry in self._cache.all() for file in entry.files}
        for draft, name in zip(drafts, names, strict=True):
            final = self._cache.place(f"{IMPORTED}/{together}", name)
            there = known.get(str(final.relative_to(self._cache.root)))
            if there is not None and there.sha256 == draft.sha256 and self._cache.is_untouched(there):
                files.append(replace(there, expected=bool(wanted.digests)))  # another name has it, and goes on having it
                continue
            self._cache.make_folder(final.parent)
            try:
                draft.path.replace(final)
                found = final.stat()
            except OSError as problem:
                raise disk_error(final, problem) from problem
            self._digests.know(found, f"sha256:{draft.sha256}")
            relative = str(final.relative_to(self._cache.root))
            files.append(CachedFile(relative, found.st_size, draft.sha256, bool(wanted.digests), found.st_mtime_ns))
        entry = Entry(wanted.ref.id, "", time.time_ns() // 1_000_000, tuple(files))
        self._cache.register(entry)
        return entry

    def _refuse_other(self, wanted: Import, size: int) -> None:
        """Before anything is copied, where another model has the name already."""
        before = self._cache.find(wanted.ref.id)
        if before is not None and before.size_bytes != size:
            raise _name_taken(wanted.ref, before)

    @contextmanager
    def _draft(self, source: int, imported: Path, copying: _Copying) -> Iterator[_Draft]:
        path = self._cache.root / "partial" / f"import-{secrets.token_hex(8)}.part"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # as long as it is held nobody sweeps it away
                sha256 = copying.copy(source, imported, fd, self._room)
                _header(path, imported)  # of what was copied: the path may lead to another file by now
                os.fchmod(fd, 0o444)
                os.fsync(fd)
                yield _Draft(path, sha256)
            finally:
                with suppress(FileNotFoundError):  # it has its name by now
                    path.unlink()
                os.close(fd)
        except OSError as problem:
            raise disk_error(path, problem) from problem

    def _sweep(self) -> None:
        """What imports have left that were killed."""
        with suppress(OSError):
            for path in (self._cache.root / "partial").iterdir():
                if not _DRAFT.fullmatch(path.name):
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    with suppress(BlockingIOError):
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink(missing_ok=True)
                finally:
                    os.close(fd)


@dataclass(frozen=True, slots=True)
class _Draft:
    path: Path
    sha256: str


class _Copying:
    """One import: told to stop from outside, tells how far it is."""

    def __init__(self, stop: threading.Event, report: Callable[[int, int], None]) -> None:
        self.total = 0
        self._stop, self._report, self._done = stop, report, 0

    def copy(self, source: int, imported: Path, target: int, room: Room) -> str:
        """All of ``source``; its sha256 in hex. A clone shares its blocks on the disk until one of them is written to: who
        changes the original changes nothing here. Raises OSError, PoolError.
        """
        before = os.fstat(source)
        cloned = _clone(source, target)
        if not cloned:
            room.require(before.st_size, str(imported))
        digest, offset = hashlib.sha256(), 0
        with _Writing(target) as writing:
            for block in itertools.cycle([memoryview(bytearray(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))]):
                count = _read(target if cloned else source, block, offset, imported)
                writing.settle()
                if not count or offset > before.st_size:
                    break
                if self._stop.is_set():
                    raise NodeError("cannot finish the import: it was cancelled")
                if not cloned:
                    writing.write(block[:count], offset)
                digest.update(block[:count])
                offset += count
                self._done += count
                self._report(self._done, max(self.total, self._done))
        if offset != before.st_size or identity(os.fstat(source)) != identity(before):
            raise SpecError(
                "cannot import it: the file is changed while it is read", hint="wait until it is complete", status=409
            )
        return digest.hexdigest()


class _Writing:
    """A block is written while the caller hashes it and reads the next one, and sent to the disk on the way. Raises OSError."""

    def __init__(self, target: int) -> None:
        self._target, self._pool = target, ThreadPoolExecutor(2)
        self._written: Future[None] | None = None
        self._flushed: Future[None] | None = None
        self._unflushed = 0

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._flushed is not None:
            self._flushed.result()  # the kernel tells once that it could not

    def write(self, block: memoryview, offset: int) -> None:
        if self._unflushed >= FLUSH_BYTES and (self._flushed is None or self._flushed.done()):
            if self._flushed is not None:
                self._flushed.result()
            self._unflushed, self._flushed = 0, self._pool.submit(os.fdatasync, self._target)
        self._unflushed += len(block)
        self._written = self._pool.submit(_write, self._target, block, offset)

    def settle(self) -> None:
        """Return when what was given is written."""
        if self._written is not None:
            self._written.result()


def _clone(source: int, target: int) -> bool:
    """Whether the disk could share the blocks: not every file system can, and none with another."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _read(fd: int, block: memoryview, offset: int, imported: Path) -> int:
    try:
        return os.preadv(fd, [block], offset)
    except OSError as problem:
        raise _refused(
            imported, f"it cannot be read: {problem.strerror}", hint="check its disk and the kernel's log"
        ) from problem


def _write(fd: int, block: memoryview, offset: int) -> None:
    while block:
        count = os.pwrite(fd, block, offset)
        block, offset = block[count:], offset + count


def _parts_of(path: Path) -> list[Path]:
    """All files of the model. Raises SpecError for what is none; nothing of its content is in the message."""
    with _source(path):
        header = _header(path, path)
    return [path, *map(Path, other_parts(str(path), header.values))]


def _header(path: Path, imported: Path) -> GgufHeader:
    """Raises SpecError naming ``imported``; how a file that is no model begins is none of the caller's business."""
    if not is_gguf(str(path)):
        raise _refused(imported, "it is no GGUF model")
    try:
        return read_gguf_header(str(path))
    except SpecError as problem:
        raise _refused(imported, problem.message.rpartition(" as a GGUF model: ")[2]) from None


@contextmanager
def _source(path: Path) -> Iterator[int]:
    """A descriptor of the file, never waiting for a pipe. The daemon's user reads it, whoever asks for the import."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as problem:
        hint = f"the daemon reads it, as uid {os.geteuid()}: put it where that user may read it, such as /srv"
        raise _refused(path, f"it cannot be read: {problem.strerror}", hint=hint) from problem
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _refused(path, "it is a directory, and a model is a file" if stat.S_ISDIR(info.st_mode) else "it is no file")
        if os.geteuid() == 0 and _is_private(path, info):
            raise _refused(
                path, "it is closed to other users, and a copy in the cache would be open to all of them",
                hint=f"open it first, if that is meant: chmod o+r {path}, and o+x for the directories on the way",
            )  # fmt: skip
        yield fd
    finally:
        os.close(fd)


def _is_private(path: Path, info: os.stat_result) -> bool:
    """Whether its owner keeps it from others: a daemon that is root reads it for whoever asks."""
    homes = (folder.stat() for folder in path.parents)
    return not info.st_mode & stat.S_IROTH or any(home.st_uid and not home.st_mode & stat.S_IXOTH for home in homes)


def _names(name: str, count: int) -> list[str]:
    """What the files are called in the cache: parts of a split model as engines look for them."""
    plain = _PART.sub("", re.sub(r"[^A-Za-z0-9._-]", "_", name.removesuffix(".gguf"))).lstrip(".-_")[:100] or "model"
    return [f"{plain}.gguf"] if count == 1 else [f"{plain}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def _refused(path: Path, why: str, code: str | None = None, hint: str | None = None) -> PoolError:
    return SpecError(f"cannot import {path}: {why}", code=code, status=422, hint=hint)


def _name_taken(ref: ModelRef, before: Entry) -> PoolError:
    return SpecError(
        f"cannot import it as {ref.id}: another model has that name, {before.digest}", status=409,
        hint=f"give it another one (--as), or remove that one first: pool-managerd models rm {ref.id}",
    )  # fmt: skip
