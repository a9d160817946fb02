"""One file over HTTP, whatever happens on the way: tried again where it stopped, as long as there is any use in it."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp

from pool_managerd.core.narration import duration, size
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.fetch_rules import shown
from pool_managerd.models.part import Part, Validator, boot_id
from pool_managerd.models.progress import Progress
from pool_managerd.models.remote import RemoteFile
from pool_managerd.models.room import Room
from pool_managerd.models.web import AgainError, Web

_T = TypeVar("_T")

WRITE_BYTES = 4 << 20
TELL_S = 0.5
"""So often is said how far it is, and what there is written, however little came."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


@dataclass(frozen=True, slots=True)
class Persistence:
    """How long a download is tried: ``tries`` in a row that bring less than ``worth_bytes``, with waits that double between them.

    One that brings less than ``slowest`` bytes a second over ``window_s`` is broken off, as a new connection may be faster.
    """

    tries: int = 6
    worth_bytes: int = 1 << 20
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 300.0
    slowest: int = 1024
    window_s: float = 60.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def persistently(work: Callable[[], Awaitable[_T]], what: str, p: Persistence, done: Callable[[], int]) -> _T:
    """The result of ``work``, which is tried again after an AgainError; ``done`` counts the bytes that it has brought so far.

    Raises NodeError with the last reason.
    """
    failed = 0
    while True:
        before = done()
        try:
            return await work()
        except AgainError as problem:
            failed = 1 if done() - before >= p.worth_bytes else failed + 1
            asked = problem.retry_after_s
            if failed >= p.tries or (asked is not None and asked > p.longest_retry_after_s):
                when = f", and wants to be asked again in {duration(asked)}" if asked else ""
                raise NodeError(
                    f"cannot fetch {what}: {problem}{when}", code="FETCH_FAILED", retriable=True,
                    hint="what is there by now is kept: the next try goes on behind it",
                ) from problem  # fmt: skip
        wait = min(p.longest_wait_s, p.first_wait_s * 2 ** (failed - 1)) * random.uniform(0.75, 1.25)
        await p.sleep(max(wait, asked or 0))


class Download:
    """Brings ``file`` to ``final``, by way of ``part_path``; the caller has the lock of both. ``received`` bytes came for it, and
    ``etag`` is what the server calls this version of it.
    """

    def __init__(self, web: Web, room: Room, persistence: Persistence) -> None:
        self._web, self._room, self._persistence = web, room, persistence
        self.received, self.etag = 0, ""

    async def run(self, file: RemoteFile, part_path: Path, final: Path, progress: Progress) -> str:
        """The sha256 in hex of the complete file. Raises PoolError; what is there by then is kept, unless it is wrong."""
        part = Part(part_path, Validator(str(file.url.with_query(None)), "", file.size, file.sha256, boot_id()))
        try:
            await part.open(lambda done: progress(done, file.size or 0))
            if not await self._all_of(file, part, progress):
                await part.restart()  # a bit may have been lost on the way, or on the disk: once more, all of it
                if not await self._all_of(file, part, progress):
                    found = part.sha256
                    await part.restart()
                    raise _mismatch(file, found)
            self.etag = part.validator.etag
            return await part.finish(final)
        finally:
            await part.close()

    async def _all_of(self, file: RemoteFile, part: Part, progress: Progress) -> bool:
        """Whether it is the right file, once it is complete. Raises PoolError."""
        await persistently(lambda: self._attempt(file, part, progress), shown(file.url), self._persistence, lambda: part.size)
        return file.sha256 in (None, part.sha256)

    async def _attempt(self, file: RemoteFile, part: Part, progress: Progress) -> None:
        """From where the part ends to the end of the file. Raises AgainError and PoolError."""
        known = part.validator
        if part.size and part.size == known.size:
            return
        headers = {"Range": f"bytes={part.size}-"} if part.size else {}
        if part.size and known.etag:
            headers["If-Range"] = known.etag
        async with self._web.get(file.url, headers) as response:
            total = await self._begin(file, part, response)
            await asyncio.to_thread(self._room.require, (total or part.size) - part.size, shown(file.url))
            try:
                await self._receive(response, part, total, progress)
            finally:
                await part.settled()
        if total is not None and part.size != total:
            raise AgainError(f"the connection ended after {size(part.size)} of {size(total)}")

    async def _begin(self, file: RemoteFile, part: Part, response: aiohttp.ClientResponse) -> int | None:
        """How many bytes the whole has, None where nobody says; the part goes on, or begins anew. Raises AgainError."""
        etag = response.headers.get("ETag", "")
        etag = "" if etag.startswith("W/") or len(etag) > 1024 else etag  # a weak one says nothing of bytes
        if response.status == 206:
            told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            total = int(told[2]) if told and told[2] != "*" else None
            known = part.validator
            goes_on = told is not None and int(told[1]) == part.size and known.etag in ("", etag)
            if goes_on and total is not None and known.size in (None, total):
                return total
        if response.status != 200:  # of other bytes than those that are wanted: what is there is of another file
            await part.restart()
            raise AgainError(f"{response.url.host} has another file than before")
        total = response.content_length
        if file.size is not None and total not in (None, file.size):
            raise AgainError(f"{response.url.host} has {size(total or 0)}, and it should be {size(file.size)}")
        total = file.size if total is None else total
        if total is None and file.sha256 is None:
            raise SpecError(
                f"cannot fetch {shown(file.url)}: {response.url.host} does not say how long it is: nobody could tell when it is"
                " complete", status=422, hint="give its checksum: provisioning.model.checksum",
            )  # fmt: skip
        await part.restart(etag, total)
        return total

    async def _receive(self, response: aiohttp.ClientResponse, part: Part, total: int | None, progress: Progress) -> None:
        pace, host = _Pace(self._persistence, str(response.url.host)), response.url.host
        chunks, gathered, done, checked, told_at = list[bytes](), 0, part.size, part.size, time.monotonic()
        try:
            async for chunk in response.content.iter_any():
                done += len(chunk)
                self.received += len(chunk)
                if total is not None and done > total:
                    raise AgainError(f"{host} sends more than the {size(total)} that it said")
                chunks.append(chunk)
                gathered, now = gathered + len(chunk), time.monotonic()
                if gathered >= WRITE_BYTES or now - told_at >= TELL_S:
                    await part.write(chunks)
                    chunks, gathered, told_at = [], 0, now
                    progress(done, total or 0)
                if done - checked >= Room.CHECKED_BYTES:
                    await asyncio.to_thread(self._room.require, (total or done) - done, shown(response.url))
                    checked = done
                pace.keep(len(chunk), now)
                await self._web.bandwidth.spend(len(chunk))
        finally:
            if chunks:
                await part.write(chunks)
        await part.settled()
        progress(part.size, total or 0)


class _Pace:
    """Bytes in a window of time."""

    def __init__(self, p: Persistence, host: str) -> None:
        self._p, self._host, self._since, self._brought = p, host, time.monotonic(), 0

    def keep(self, count: int, now: float) -> None:
        """Raises AgainError where it is too slow to be worth waiting for."""
        self._brought += count
        passed = now - self._since
        if passed >= self._p.window_s:
            if self._brought < self._p.slowest * passed:
                raise AgainError(f"{self._host} sends only {size(self._brought)} in {duration(passed)}")
            self._since, self._brought = now, 0


def _mismatch(file: RemoteFile, found: str) -> SpecError:
    return SpecError(
        f"cannot use {shown(file.url)}: digest mismatch: expected sha256:{file.sha256}, found sha256:{found}",
        code="DIGEST_MISMATCH", status=422, hint="see whether the checksum is the right one, and who answers there",
    )  # fmt: skip
