"""Models that other tools have on this machine: found by reference, verified, used where they lie, and never changed."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.errors import SpecError
from pool_managerd.models.byte_reader import identity
from pool_managerd.models.candidates import Candidate, Search
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.file_lock import POLL_S
from pool_managerd.models.foreign_files import ForeignFile, doubt, foreign_file
from pool_managerd.models.gguf import is_gguf
from pool_managerd.models.hub_folders import blobs_in, repository_in
from pool_managerd.models.ollama import ollama_model
from pool_managerd.models.places import Layout, Place
from pool_managerd.models.progress import Progress, beyond
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.remote import RemoteModel, chosen_in
from pool_managerd.models.used_notes import Used, UsedFile, UsedNotes

_NO_DIGEST = "keeps no digests"
HASHED_AT_ONCE = 2
"""Files: at a first boot all pools ask for theirs, and a disk gives no more when many are read beside each other."""

Obstacle = Callable[[str], str | None]
"""What keeps the engines' user from reading a file, in words; None where nothing does. Blocks."""


class Elsewhere:
    """``places`` are looked at in their order. ``tell`` gets a sentence for each model that is used, or is not and why."""

    def __init__(
        self, places: Sequence[Place], notes: UsedNotes, digests: DigestCache, obstacle: Obstacle = lambda _: None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.places, self.notes, self.obstacle = tuple(places), notes, obstacle
        self._digests, self._tell = digests, tell
        self._hashing: dict[Path, int] = {}

    # --- looked for, in threads ---

    def located(self, model: ModelRef, *, with_checksum: bool = False) -> ResolvedModel | None:
        """Where it lies: what was hashed, else what a start would hash first. Blocks."""
        used = self.remembered(model)
        if used is not None:
            paths, size = tuple(file.place for file in used.files), sum(file.size for file in used.files)
            return ResolvedModel(model.id, paths[0], size, used.digest, verified=True, files=paths if len(paths) > 1 else ())
        for one in self.search(model).candidates:
            if (one.digests or with_checksum) and not self.objection(one):
                paths = tuple(str(file.place) for file in one.files)
                return ResolvedModel(model.id, paths[0], one.size_bytes, files=paths if len(paths) > 1 else ())
        return None

    def remembered(self, model: ModelRef) -> Used | None:
        """What was hashed for it and is used, as long as it may be: its place is still one, and nobody else may change it."""
        used = self.notes.find(model.id)
        roots = {str(place.root) for place in self.places}
        if used is None or not all(file.root in roots for file in used.files):
            return None
        return None if self.objection(Candidate.of(used)) else used

    def may_have(self, model: ModelRef, found: Search) -> bool:
        """Whether it helps to know what the hub has: by its content, or by its size and name, something may be that. Blocks."""
        if not (model.file or model.quantisation):
            return False
        return bool(found.candidates) or any(blobs for _, blobs in self._blobs(model))

    def likely(self, model: ModelRef) -> Candidate | None:
        """What would be hashed, and then used if it is right, without asking anybody. Blocks."""
        return next((one for one in self.search(model).candidates if one.digests and not self.objection(one)), None)

    def search(self, model: ModelRef) -> Search:
        """What there is for it, by its name. Blocks."""
        found, reasons = list[Candidate](), list[str]()
        for place in self.places:
            layouts = [layout for layout in place.layouts if (layout is Layout.OLLAMA) == (model.scheme == "ollama")]
            if layouts and (closed := _closed(place.root)):
                reasons.append(closed)
            for layout in layouts:
                try:
                    one = self._candidate(model, place, layout)
                except SpecError as problem:
                    reasons.append(problem.message)
                else:
                    found += [one] if one is not None else []
        return Search(tuple(found), tuple(reasons))

    def _candidate(self, model: ModelRef, place: Place, layout: Layout) -> Candidate | None:
        """Raises SpecError for what is there and cannot be used."""
        if model.scheme == "ollama":
            found = ollama_model(place.root, model)
            if found is not None and not is_gguf(str(found.file.place)):
                raise SpecError(f"{found.file.place} is no GGUF model, or cannot be read")
            return Candidate(model.id, place.tool, (found.file,), notices=found.notices) if found is not None else None
        if model.scheme != "hf" or not (model.file or model.quantisation):
            return None
        there = repository_in(place.root, layout, model.location, model.revision)
        if there is None:
            return None
        wanted = model if layout is not Layout.FLAT else _flattened(model)
        try:
            chosen = chosen_in(there.listing(), wanted)
        except SpecError as problem:
            missing = problem.details.get("missing")
            if missing:
                raise SpecError(f"{place.tool} has only some parts of it: {', '.join(missing)} not") from None
            return None
        by_path = {file.path: file for file in there.files}
        return Candidate(model.id, place.tool, tuple(by_path[file.path] for file in chosen), there.commit)

    def objection(self, found: Candidate) -> str:
        """Why it must not be used, whatever it contains; empty where it may be. Blocks."""
        for file in found.files:
            if reason := doubt(file):
                return reason
            if obstacle := self.obstacle(str(file.place)):
                name = "" if found.ref.startswith("ollama:") else f" --as {found.ref}"
                remedy = f"open it to them, or have a copy: pool-managerd models import {file.place}{name}"
                return f"{file.place} cannot be read by engines: {obstacle}; {remedy}"
        return ""

    # --- used ---

    async def use(self, model: ModelRef, expected: Sequence[str], progress: Progress) -> Search:
        """Verify what there is by its name, until one is right: against ``expected`` (``sha256:<hex>`` for each file), else
        against what its tool says. ``used`` is None where none is.
        """
        used = await asyncio.to_thread(self.remembered, model)
        if used is not None and (not expected or used.digest == ",".join(expected)):
            await asyncio.to_thread(self._know, used)
            return Search(used=used)
        found = await asyncio.to_thread(self.search, model)
        return await self._first_right(found, lambda one: tuple(expected) or one.digests, progress)

    def _know(self, used: Used) -> None:
        """What an earlier daemon has hashed is not hashed again for a checksum. Blocks."""
        for file in used.files:
            with suppress(OSError):
                info = Path(file.place).stat()
                if identity(info) == file.identity:
                    self._digests.know(info, f"sha256:{file.sha256}")

    async def use_as(self, remote: RemoteModel, before: Search, progress: Progress) -> Search:
        """The same, of what the hub has for a reference now: also by content, and of files that no tool has a digest of."""
        reasons = tuple(reason for reason in before.reasons if _NO_DIGEST not in reason)
        found = Search(await asyncio.to_thread(self.matching, remote, before), reasons)
        expected = tuple(f"sha256:{file.sha256}" for file in remote.files)
        return await self._first_right(found, lambda _: expected, progress) if found.candidates else before

    def matching(self, remote: RemoteModel, before: Search) -> tuple[Candidate, ...]:
        """What may be the model that the hub has, by its size, or by what its blob is called. Blocks."""
        if any(file.sha256 is None for file in remote.files):
            return ()
        named = (
            one for one in before.candidates
            if not one.digests and len(one.files) == len(remote.files)
            and all(there.size in (None, here.size) for there, here in zip(remote.files, one.files, strict=True))
        )  # fmt: skip
        tried = {os.path.realpath(file.place) for one in before.candidates for file in one.files if one.digests}
        blobs = (one for one in self._by_content(remote) if os.path.realpath(one.files[0].place) not in tried)
        return (*blobs, *named)

    def _by_content(self, remote: RemoteModel) -> Iterator[Candidate]:
        """Blobs have no names that an engine could tell parts of a model by: models in one file alone."""
        (file, *more), ref = remote.files, remote.ref
        if more or not file.sha256:
            return
        for place, blobs in self._blobs(ref):
            for name in (file.sha256, f"sha256-{file.sha256}"):
                found = foreign_file(file.name, blobs / name, place.root, file.sha256)
                if found is not None:
                    yield Candidate(ref.id, place.tool, (found,), remote.source)

    def _blobs(self, model: ModelRef) -> Iterator[tuple[Place, Path]]:
        for place in self.places:
            for layout in place.layouts:
                blobs = blobs_in(place.root, layout, model.location)
                if blobs is not None:
                    yield place, blobs

    async def _first_right(self, found: Search, wanted: Callable[[Candidate], tuple[str, ...]], progress: Progress) -> Search:
        reasons = list(found.reasons)
        for one in found.candidates:
            try:
                used = await self._verified(one, wanted(one), progress)
            except _NotRightError as why:
                reasons.append(str(why))
                continue
            await asyncio.to_thread(self.notes.put, used)
            extra = "".join(f"; {notice}" for notice in one.notices)
            self._tell(f"The model {one.ref} is used where {one.tool} has it: {one.files[0].place}{extra}")
            return Search(found.candidates, tuple(reasons), used)
        return Search(found.candidates, tuple(dict.fromkeys(reasons)))

    def tell_of(self, found: Search, model: ModelRef) -> None:
        """It is fetched, although something of that name is here."""
        for reason in found.reasons:
            self._tell(f"The model {model.id} is fetched; what is on this machine is not used: {reason}")

    async def _verified(self, found: Candidate, wanted: tuple[str, ...], progress: Progress) -> Used:
        """Raises _NotRightError."""
        first = found.files[0].place
        if not wanted:
            raise _NotRightError(
                f"{first} ({found.tool} {_NO_DIGEST}: give provisioning.model.checksum, or refer to it as file:{first})"
            )
        if len(wanted) != len(found.files):
            raise _NotRightError(f"{first} is one of {len(found.files)} files, and there are {len(wanted)} checksums")
        if reason := await asyncio.to_thread(self.objection, found):
            raise _NotRightError(reason)
        done, files = 0, list[UsedFile]()
        for file, digest in zip(found.files, wanted, strict=True):
            files.append(await self._hashed(file, digest, beyond(progress, done, found.size_bytes)))
            done += file.size
        return Used(found.ref, found.tool, found.source, time.time_ns() // 1_000_000, tuple(files))

    async def _hashed(self, file: ForeignFile, wanted: str, progress: Progress) -> UsedFile:
        try:
            fd = await asyncio.to_thread(os.open, file.place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError("it is no file any more")
                digest, info = await self._hash(file, fd, progress), os.fstat(fd)
            finally:
                os.close(fd)
            there = await asyncio.to_thread(file.place.stat)
        except OSError as problem:
            raise _NotRightError(f"{file.place} cannot be read: {problem.strerror or problem}") from problem
        if identity(there) != identity(info):
            raise _NotRightError(f"{file.place} was changed while it was hashed")
        if digest != wanted:
            raise _NotRightError(f"{file.place} has another digest: expected {wanted}, found {digest}")
        return UsedFile(str(file.place), str(file.root), info.st_size, digest.removeprefix("sha256:"), identity(info))

    async def _hash(self, file: ForeignFile, fd: int, progress: Progress) -> str:
        """Pools that start at the same time with the same model read it once, and no more than a few are read at a time."""
        while file.place in self._hashing or len(self._hashing) >= HASHED_AT_ONCE:
            progress(self._hashing.get(file.place, 0), file.size)
            await asyncio.sleep(POLL_S)

        def tell(done: int, total: int) -> None:
            self._hashing[file.place] = done
            progress(done, total)

        self._hashing[file.place] = 0
        try:
            return await self._digests.sha256(fd, tell)
        finally:
            del self._hashing[file.place]


class _NotRightError(Exception):
    """Why a file is not used."""


def _closed(root: Path) -> str:
    """Why the daemon cannot look into it: other users' homes are closed to it. Empty where it can, or where nothing is."""
    try:
        os.scandir(root).close()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as problem:
        return f"{root} cannot be read: {problem.strerror or problem} for uid {os.geteuid()}, which the daemon runs as"
    return ""


def _flattened(model: ModelRef) -> ModelRef:
    return ModelRef(
        model.scheme, model.id, model.location, model.file.replace("/", "_"), model.revision, model.quantisation
    )  # fmt: skip
