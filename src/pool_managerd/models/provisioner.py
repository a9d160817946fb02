"""Getting a model onto this machine's disk, verified: ``ensure_present(ref, digest) -> {id, local_path}`` (SPEC §6.3)."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pool_managerd.config import PolicyConfig, path_from
from pool_managerd.core.artifacts import NOT_FETCHED, ResolvedModel
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.cache import Entry, ModelCache
from pool_managerd.models.digests import DigestCache, Progress
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.fetch_rules import FETCHED, check_network, check_scheme
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.gguf import MAGIC, check_gguf, head_of, is_gguf
from pool_managerd.models.not_here import ollama_has_not, require_fetchable
from pool_managerd.models.refs import ModelRef, parse_ref
from pool_managerd.models.shapes import Shapes
from pool_managerd.models.used_notes import UsedNotes

PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""Formats that run code of their author's choice when they are loaded; what a file begins with says more than its name."""

PICKLE_HEADS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_NAMES = 10_000


class ModelProvisioner:
    """Resolves model references: local files, what ``cache`` has, what other tools have on this machine (``elsewhere``, nothing
    until it is set), and with a ``fetcher`` what there is in the network. Without one that is never touched.

    ``base_dir`` is what relative ``file:`` paths are relative to: the directory of the configuration file.
    """

    def __init__(
        self, base_dir: Path, policy: PolicyConfig, cache: ModelCache | None = None, fetcher: Fetcher | None = None,
        digests: DigestCache | None = None,
    ) -> None:  # fmt: skip
        self._base_dir = base_dir
        self.policy = policy
        self._cache, self._fetcher = cache, fetcher
        self._digests = digests or DigestCache()
        self.shapes = Shapes()
        self.elsewhere = Elsewhere((), UsedNotes(cache or ModelCache(base_dir)), self._digests)

    async def ensure_present(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> ResolvedModel:
        """The model of ``ref`` on local disk, hashed against ``expected_digest`` (``sha256:<hex>``) when one is given.

        It is fetched where that is needed, and allowed. A split model takes one digest per part, in their order. Without a digest
        a local file is not hashed and ``verified`` is false; one that was fetched is what its hub said. ``progress`` is called in
        the event loop with (bytes fetched, then hashed, bytes in all). Raises SpecError for a bad reference, a missing or
        unusable file, what the policy denies (``POLICY_DENIED``) or wrong content (``DIGEST_MISMATCH``); NodeError when this
        version has no way to fetch it (``POOL_UNREADY``, ORCH-3091), when it could not be fetched (``FETCH_FAILED``) or the disk
        fails.
        """
        await self.fetch(ref, expected_digest, progress=progress)
        expected = _expected(expected_digest)
        found = await asyncio.to_thread(self.check, ref, expected)
        if not expected:
            return found
        parts, done = found.files or (found.local_path,), 0
        for part, wanted in zip(parts, expected, strict=True):
            await self._verify(Path(part), wanted, _beyond(progress, done, found.size_bytes))
            done += await asyncio.to_thread(size_of, part)
        for part, wanted in zip(parts[:-1], expected[:-1], strict=True):  # known, unless it changed while later ones were read
            await self._verify(Path(part), wanted, None)
        return replace(found, digest=",".join(expected), verified=True)

    async def fetch(
        self, ref: str, expected_digest: str | Sequence[str] | None = None, *, progress: Progress | None = None,
        checking: Progress | None = None,
    ) -> None:  # fmt: skip
        """Bring the model of ``ref`` into the cache, unless it is a local file or there already, or another tool on this machine
        has it: then that is verified, which ``checking`` hears of. Raises as ``ensure_present``.

        Cancelled, it leaves what is there by then for the next one, unless others wait for the same model.
        """
        model, expected, checking = parse_ref(ref), _expected(expected_digest), checking or progress or _nobody
        if model.scheme == "ollama":
            found = await self.elsewhere.use(model, expected, checking)
            if found.used is None:
                raise found.told_with(await asyncio.to_thread(ollama_has_not, model, self.elsewhere))
        if model.scheme == "local":
            await asyncio.to_thread(self.locate, ref)
        if model.scheme not in FETCHED or self._fetcher is None or self._cache is None:
            return
        check_scheme(self.policy, model)
        entry = await asyncio.to_thread(self._cache.find, model.id)
        if entry is not None and (not expected or entry.digest == ",".join(expected)):
            return
        if await self._is_elsewhere(model, expected, checking, self._fetcher):
            return
        entry = await self._fetcher.fetch(model, expected, progress or _nobody)
        if not entry.verified:
            await asyncio.to_thread(self._keep_usable, self._cache, entry)

    async def _is_elsewhere(self, model: ModelRef, expected: tuple[str, ...], checking: Progress, fetcher: Fetcher) -> bool:
        """Whether another tool has it and it is verified; else it may be fetched. Raises PoolError where it may not.

        The hub is asked what it has to be where nobody here says so.
        """
        found = await self.elsewhere.use(model, expected, checking)
        if found.used is not None:
            return True
        try:
            check_network(self.policy, model)
            if model.scheme == "hf" and await asyncio.to_thread(self.elsewhere.may_have, model, found):
                found = await self.elsewhere.use_as(await fetcher.look(model, expected), found, checking)
        except PoolError as problem:
            raise found.told_with(problem) from None
        if found.used is None:
            self.elsewhere.tell_of(found, model)
        return found.used is not None

    def _keep_usable(self, cache: ModelCache, entry: Entry) -> None:
        """What nobody has vouched for may be an error page: that does not stay. Raises SpecError."""
        try:
            for file in entry.files:
                _check_usable(cache.root / file.path, entry.ref)
        except SpecError:
            cache.remove(entry.ref)
            raise

    async def _verify(self, path: Path, expected: str, progress: Progress | None) -> None:
        digest = await self._digest(path, progress)
        if digest != expected:
            raise SpecError(
                f"cannot use {path}: digest mismatch: expected {expected}, found {digest}",
                code="DIGEST_MISMATCH",
                status=422,
                hint="fetch the model again, or correct provisioning.model.checksum if the file is the right one",
            )

    def id_of(self, ref: str) -> str:
        """What the model of ``ref`` will be called (ORCH-3704); a malformed one, which no start accepts, as it stands."""
        try:
            return parse_ref(ref).id
        except SpecError:
            return ref

    def check(self, ref: str, digests: Sequence[str] = ()) -> ResolvedModel:
        """``locate``, and whether there is a digest for each file where there are any; hashes nothing. Raises SpecError."""
        found = self.locate(ref, digests)
        path, parts = Path(found.local_path), max(1, len(found.files))
        if digests and path.is_dir():
            raise SpecError(
                f"cannot verify {path}: a digest belongs to a file and this is a directory",
                hint="name the file inside it in `model`, or remove the checksum",
            )
        if digests and len(digests) != parts:
            raise _not_for_each_part(path, parts, len(digests))
        return found

    def locate(self, ref: str, digests: Sequence[str] = ()) -> ResolvedModel:
        """Where the model of ``ref`` lies, all its parts, unverified; of the content no more than headers is read. ``digests``
        are those that it will be verified against.

        Blocking. Raises as ``ensure_present``.
        """
        model = parse_ref(ref)
        check_scheme(self.policy, model)
        if model.scheme != "file":
            return self._in_cache(model, with_checksum=bool(digests))
        path = self.path_of(model)
        size = _check_usable(path, model.id)
        parts = self.shapes.parts_of(path) if is_gguf(str(path)) else ()
        if len(parts) < 2:
            return ResolvedModel(model.id, str(path), size)
        size += sum(_check_usable(Path(part), model.id) for part in parts[1:])
        return ResolvedModel(model.id, str(path), size, files=parts)

    def _in_cache(self, model: ModelRef, *, with_checksum: bool) -> ResolvedModel:
        if model.scheme not in (*FETCHED, "ollama", "local"):
            raise NodeError(
                f"cannot fetch {model.id}: this version fetches {', '.join(FETCHED)} models",
                code="POOL_UNREADY", hint="download it yourself, and refer to it as file:/path/to/model", retriable=False,
            )  # fmt: skip
        entry = None if self._cache is None else self._cache.find(model.id)
        if entry is None or self._cache is None:
            found = self.elsewhere.located(model, with_checksum=with_checksum)
            if found is not None:
                for one in found.files or (found.local_path,):
                    _check_usable(Path(one), model.id)
                return found
            require_fetchable(model, self.elsewhere, self.policy)
            if model.scheme == "hf" and not (model.file or model.quantisation):
                raise SpecError(
                    f"cannot fetch {model.id}: this version fetches one model, not a whole repository",
                    hint=f"name a file ({model.id}/FILE.gguf) or a quantisation ({model.id}:Q4_K_M)",
                )
            raise NodeError(
                f"cannot use {model.id} yet: it was not fetched", code=NOT_FETCHED,
                hint=f"a start fetches it, and so does: pool-managerd models pull {model.id}",
            )  # fmt: skip
        paths = [self._cache.root / file.path for file in entry.files]
        for path in paths:
            _check_usable(path, model.id)
        files = tuple(map(str, paths)) if len(paths) > 1 else ()
        return ResolvedModel(model.id, str(paths[0]), entry.size_bytes, entry.digest, entry.verified, files)

    async def ensure_present_str(self, ref: str) -> ResolvedModel:
        """``ensure_present`` without a digest, under the name of the specification (ORCH-3700)."""
        return await self.ensure_present(ref)

    def path_of(self, model: ModelRef) -> Path:
        """Where a ``file:`` model lies: relative paths start at the configuration file's directory."""
        return Path(os.path.normpath(path_from(self._base_dir, model.location)))

    async def _digest(self, path: Path, progress: Progress | None) -> str:
        try:
            for _ in range(2):
                fd = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    digest = await self._digests.sha256(fd, progress)
                    if await asyncio.to_thread(_is_at, path, fd):
                        return digest
                finally:
                    os.close(fd)
            raise OSError("it is replaced again and again while it is read")
        except OSError as error:
            raise NodeError(
                f"cannot read {path}: {error.strerror or error}", hint="check the disk and the kernel's log", retriable=True
            ) from error


def _nobody(_done: int, _total: int) -> None:
    """Nobody wants to know how far it is."""


def _expected(given: str | Sequence[str] | None) -> tuple[str, ...]:
    digests = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    normal = tuple(digest.strip().lower() for digest in digests)
    for digest in normal:
        if not _DIGEST.fullmatch(digest):
            raise SpecError(f"cannot use {digest[:80]!r} as a digest: it must be sha256: and 64 hexadecimal digits")
    return normal


def _not_for_each_part(path: Path, parts: int, given: int) -> SpecError:
    pattern = path.name.replace("-00001-of-", "-*-of-")
    what = f"the model is split into {parts} parts" if parts > 1 else "the model is one file"
    hint = f"list one per part, in their order: sha256sum {pattern}" if parts > 1 else "give one checksum"
    return SpecError(
        f"cannot verify {path}: {what}, and provisioning.model.checksum has {given} digest{'s' if given > 1 else ''}", hint=hint
    )


def _beyond(progress: Progress | None, done: int, total: int) -> Progress | None:
    """Progress of one part among all."""
    return None if progress is None else lambda more, _: progress(done + more, total)


def _is_at(path: Path, fd: int) -> bool:
    """Whether ``path`` still leads to the open file ``fd``: the engine opens what is there now."""
    return os.path.samestat(path.stat(), os.fstat(fd))


def size_of(path: str) -> int:
    """In bytes; 0 of what cannot be read, where nothing hangs on it."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _check_usable(path: Path, ref: str) -> int:
    """Size of the model in bytes (0 for a directory). Blocks; run in a thread. Raises SpecError with the reason."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise _missing(path, ref) from None
    except OSError as error:
        raise _unusable(path, f"{error.strerror}", "check the path and its permissions") from error
    if stat.S_ISDIR(info.st_mode):
        return 0
    if not stat.S_ISREG(info.st_mode):
        raise _unusable(path, "it is neither a file nor a directory", "name the model file itself")
    if not os.access(path, os.R_OK):
        raise _unusable(path, "it is not readable for this user", "check its permissions and those of its directories")
    if info.st_size == 0:
        raise _unusable(path, "the file is empty", "fetch the model again")
    head = head_of(str(path))
    if head[:4] != MAGIC and (path.suffix.lower() in PICKLED or head.startswith(PICKLE_HEADS)):
        reason = f"{path.suffix or 'such'} files are pickles, which run code of their author's choice when loaded"
        raise _unusable(path, reason, "use the GGUF or safetensors form of the model")
    if head[:4] == MAGIC or path.suffix.lower() == ".gguf":
        check_gguf(str(path))
    return info.st_size


def _missing(path: Path, ref: str) -> PoolError:
    try:
        names = [entry.name for entry, _ in zip(os.scandir(path.parent), range(_MAX_NAMES), strict=False)]
    except OSError:
        nearest = next((parent for parent in path.parents if parent.is_dir()), path.parent)
        return _unusable(path, "there is no such file", f"{ref} means {path}; of that path only {nearest} exists")
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(n for n in names if n.endswith(".gguf"))[:3]
    beside = f"; beside it: {', '.join(near)}" if near else f"; {path.parent} holds no similar name"
    return _unusable(path, "there is no such file", f"{ref} means {path}{beside}")


def _unusable(path: Path, reason: str, hint: str) -> SpecError:
    return SpecError(f"cannot use the model {path}: {reason}", hint=hint)
