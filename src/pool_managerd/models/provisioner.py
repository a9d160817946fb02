"""Getting a model onto this machine's disk, verified: ``ensure_present(ref, digest) -> {id, local_path}`` (SPEC §6.3)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from pool_managerd.config import PolicyConfig, path_from
from pool_managerd.core.artifacts import NOT_FETCHED, ResolvedModel
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.ahead_notes import Ahead
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.checksums import given_digests, not_for_each_part
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.entries import Entry
from pool_managerd.models.fetch_rules import FETCHED, check_network, check_scheme
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.gguf import is_gguf
from pool_managerd.models.lookahead import Lookahead
from pool_managerd.models.not_here import ollama_has_not, require_fetchable
from pool_managerd.models.progress import Progress, beyond, untold
from pool_managerd.models.refs import ModelRef, parse_ref
from pool_managerd.models.shapes import Shapes
from pool_managerd.models.told import Verified, nobody
from pool_managerd.models.usable import check_usable, size_of
from pool_managerd.models.used_notes import UsedNotes

_VOUCHED_FOR = frozenset({"hf", "oci"})
"""Schemes whose servers say themselves what their files are."""
log = structlog.get_logger("pool_managerd.models")


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
        self.tell: Callable[[Verified], None] = nobody
        self.shapes = Shapes()
        self.elsewhere = Elsewhere((), UsedNotes(cache or ModelCache(base_dir)), self._digests)
        self.ahead = None if cache is None else Lookahead(cache, fetcher, self.shapes)

    async def close(self) -> None:
        """What is being fetched or asked stops where it is."""
        if self.ahead is not None:
            await self.ahead.close()
        if self._fetcher is not None:
            await self._fetcher.close()

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
        if not await self._take(ref):  # it was deleted in this very moment
            await self.fetch(ref, expected_digest, progress=progress)
            await self._take(ref)
        expected = given_digests(expected_digest)
        found = await asyncio.to_thread(self.check, ref, expected)
        if not expected:
            return found
        return await self._verified(found, expected, progress)

    async def _take(self, ref: str) -> bool:
        """From here on whoever has decided that it may be deleted does not; false where it is not in the cache, and should be."""
        model = parse_ref(ref)
        if model.scheme not in (*FETCHED, "local") or self._cache is None:
            return True
        try:
            cached = await asyncio.to_thread(partial(self._cache.need, model.id, used=True))
            return cached or await asyncio.to_thread(self.elsewhere.remembered, model) is not None
        except NodeError as problem:
            if not problem.retriable:
                raise
            log.warning("cannot write down that a model is used", model_id=model.id, reason=problem.message)
            return True

    async def _verified(self, found: ResolvedModel, expected: tuple[str, ...], progress: Progress | None) -> ResolvedModel:
        began = time.monotonic()
        try:
            verified = await self._all_parts(found, expected, progress)
        except PoolError:
            self.tell(Verified(found.id, "fail", "start", time.monotonic() - began))
            raise
        self.tell(Verified(found.id, "pass", "start", time.monotonic() - began))
        return verified

    async def _all_parts(self, found: ResolvedModel, expected: tuple[str, ...], progress: Progress | None) -> ResolvedModel:
        parts, done = found.parts, 0
        for part, wanted in zip(parts, expected, strict=True):
            await self._verify(Path(part), wanted, beyond(progress, done, found.size_bytes) if progress else None)
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
        model, expected, checking = parse_ref(ref), given_digests(expected_digest), checking or progress or untold
        if model.scheme == "ollama":
            found = await self.elsewhere.use(model, expected, checking)
            if found.used is None:
                raise found.told_with(await asyncio.to_thread(ollama_has_not, model, self.elsewhere))
        if model.scheme == "local":
            await asyncio.to_thread(self.locate, ref)
        if model.scheme not in FETCHED or self._fetcher is None or self._cache is None:
            return
        check_scheme(self.policy, model)
        if await asyncio.to_thread(_has, self._cache, model, expected):
            return
        if await self._is_elsewhere(model, expected, checking, self._fetcher):
            return
        if model.scheme not in _VOUCHED_FOR and not expected:
            self._require_digest(model.id, verified=False)
        entry = await self._fetcher.fetch(model, expected, progress or untold)
        if self.ahead is not None:
            await asyncio.to_thread(self.ahead.forget, model.id)
        if not entry.verified:
            await asyncio.to_thread(self._keep_usable, self._cache, entry)

    async def foresee(self, ref: str, digests: Sequence[str] = (), *, fresh: bool = False) -> Ahead | None:
        """What is known of a model that would be fetched, by the headers of its files; no other byte of it is.

        ``fresh``: whether it has changed is asked, else what was read once counts. None of a model that is here, or that is never
        fetched. Raises PoolError: what it is not, what the policy denies, a hub that does not answer.
        """
        model = parse_ref(ref)
        if model.scheme not in FETCHED or self._fetcher is None or self._cache is None or self.ahead is None:
            return None
        check_scheme(self.policy, model)
        expected = given_digests(digests)
        if await asyncio.to_thread(_has, self._cache, model, expected):
            return None
        if await asyncio.to_thread(self.elsewhere.likely, model) is not None:
            return None
        check_network(self.policy, model)
        return await self.ahead.look(model, expected, fresh=fresh)

    def expected(self, ref: str) -> ResolvedModel | None:
        """The model of ``ref`` as it will be when it is fetched, where that is known; its files are not here. Blocks."""
        model = parse_ref(ref)
        return None if self.ahead is None or model.scheme not in FETCHED else self.ahead.expected(model)

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
                check_usable(cache.root / file.path, entry.ref, self.policy)
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
        path, parts = Path(found.local_path), len(found.parts)
        if digests and path.is_dir() and not found.weights:
            raise SpecError(
                f"cannot verify {path}: a digest belongs to a file and this is a directory",
                hint="name the file inside it in `model`, or remove the checksum",
            )
        if digests and len(digests) != parts:
            raise not_for_each_part(path, parts, len(digests))
        self._require_digest(found.id, verified=bool(digests) or found.verified)
        return found

    def _require_digest(self, model_id: str, *, verified: bool) -> None:
        """Raises SpecError DIGEST_MISSING where nobody has said what the model has to be, and the policy wants that said."""
        if self.policy.strict_verification and not verified:
            raise SpecError(
                f"cannot use {model_id}: nobody has said what it has to be (policy.strict_verification)", code="DIGEST_MISSING",
                status=422, hint="give its checksum: provisioning.model.checksum; for a folder there is none",
            )  # fmt: skip

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
        size = check_usable(path, model.id, self.policy)
        parts = self.shapes.parts_of(path) if is_gguf(str(path)) else ()
        if len(parts) < 2:
            return ResolvedModel(model.id, str(path), size)
        size += sum(check_usable(Path(part), model.id, self.policy) for part in parts[1:])
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
                for one in found.parts:
                    check_usable(Path(one), model.id, self.policy)
                return found
            require_fetchable(model, self.elsewhere, self.policy)
            raise NodeError(
                f"cannot use {model.id} yet: it was not fetched", code=NOT_FETCHED,
                hint=f"a start fetches it, and so does: pool-managerd models pull {model.id}",
            )  # fmt: skip
        paths = [self._cache.root / file.path for file in entry.files]
        for path in paths:
            check_usable(path, model.id, self.policy)
        files = tuple(map(str, paths)) if len(paths) > 1 and not entry.folder else ()
        weights = tuple(map(str, paths[: entry.weights])) if entry.folder else ()
        return ResolvedModel(
            model.id, str(self._cache.root / entry.path), entry.size_bytes, entry.digest, entry.verified, files, weights
        )

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


def _has(cache: ModelCache, model: ModelRef, digests: Sequence[str]) -> bool:
    """Whether it was fetched, and is what it has to be."""
    entry = cache.find(model.id)
    return entry is not None and (not digests or entry.digest == ",".join(digests))


def _is_at(path: Path, fd: int) -> bool:
    """Whether ``path`` still leads to the open file ``fd``: the engine opens what is there now."""
    return os.path.samestat(path.stat(), os.fstat(fd))
