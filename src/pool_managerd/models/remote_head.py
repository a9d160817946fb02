"""The beginning of a file that lies elsewhere: as much of it as its header takes, in few requests on one connection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import aiohttp

from pool_managerd.errors import SpecError
from pool_managerd.models.remote import RemoteFile
from pool_managerd.models.web import AgainError, Web

_T = TypeVar("_T")
LARGE_STEPS = (2_000_000, 8_000_000, 16_000_000)
"""So far a header is read, each time that it turns out to be longer: the vocabulary in it takes megabytes."""
SMALL_STEPS = (64_000, 256_000, 1_000_000, *LARGE_STEPS)
"""Of files whose headers have nothing but tensors."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_MAX_ETAG_CHARS = 1_024


class TooShortError(Exception):
    """The header goes on up to ``end`` at least, behind what is known of the file."""

    def __init__(self, end: int) -> None:
        super().__init__(f"{end} bytes are needed")
        self.end = end


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of a file of ``size`` bytes: a `byte_reader.Source`. ``etag`` tells this version of it from another."""

    size: int
    content: bytes
    etag: str = ""

    def read(self, at: int, least: int, most: int) -> bytes:
        """Raises TooShortError."""
        if at + least > len(self.content) < self.size:
            raise TooShortError(at + least)
        return self.content[at : at + most]


async def read_head(file: RemoteFile, web: Web, parse: Callable[[Head], _T], steps: tuple[int, ...]) -> tuple[Head, _T] | None:
    """What ``parse`` makes of the file's beginning, which is read up to the next of ``steps`` whenever that is too short.

    None where its header is longer than the last of them. ``parse`` runs in a thread. Raises AgainError,
    PoolError and what ``parse`` raises.
    """
    reading, end = _Reading(file, web), steps[0]
    while True:
        head = await reading.up_to(end, steps[-1])
        try:
            return head, await asyncio.to_thread(parse, head)
        except TooShortError as short:
            following = next((step for step in steps if step >= short.end and step > len(head.content)), None)
            if following is None:
                return None
            end = following


class _Reading:
    """One file, from its beginning on."""

    def __init__(self, file: RemoteFile, web: Web) -> None:
        self._file, self._web = file, web
        self._url = file.url
        self._head = Head(file.size if file.size is not None else -1, b"")

    async def up_to(self, end: int, most: int) -> Head:
        """Of a server that knows no ranges up to ``most`` bytes, once; what it sends beyond is not read."""
        start = len(self._head.content)
        try:
            async with self._web.get(self._url, self._asking(start, end)) as response:
                if response.status == 206:
                    self._goes_on(response, start)
                    content, limit = bytearray(self._head.content), end
                elif response.status == 200:
                    self._begins(response)
                    content, limit = bytearray(), most
                else:
                    raise AgainError(f"{response.url.host} answers {response.status}")
                await _fill(content, response, min(limit, self._head.size))
                self._url = response.url  # the next piece does not ask where it is once more
        except SpecError as problem:
            if self._url == self._file.url:
                raise
            raise AgainError(problem.message) from problem  # a signed address that is over
        self._head = replace(self._head, content=bytes(content))
        return self._head

    def _asking(self, start: int, end: int) -> dict[str, str]:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        return headers | {"If-Range": self._head.etag} if start and self._head.etag else headers

    def _begins(self, response: aiohttp.ClientResponse) -> None:
        """The whole file comes: this server knows no ranges, or has another file than before."""
        total = response.content_length if response.content_length is not None else self._file.size
        self._head = Head(self._checked(total, response), b"", _etag(response))

    def _goes_on(self, response: aiohttp.ClientResponse, start: int) -> None:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        etag = _etag(response)
        if told is None or int(told[1]) != start or (start and (int(told[3]), etag) != (self._head.size, self._head.etag)):
            raise AgainError(f"{response.url.host} sends other bytes than those that were asked for")
        self._head = replace(self._head, size=self._checked(int(told[3]), response), etag=etag)

    def _checked(self, total: int | None, response: aiohttp.ClientResponse) -> int:
        if total is None:
            raise AgainError(f"{response.url.host} does not say how long it is")
        if self._file.size not in (None, total):
            raise AgainError(f"{response.url.host} has {total} bytes, and it should be {self._file.size}")
        return total


async def _fill(content: bytearray, response: aiohttp.ClientResponse, end: int) -> None:
    """Raises AgainError where less comes."""
    async for chunk in response.content.iter_any():
        content += chunk[: end - len(content)]
        if len(content) >= end:
            break
    if len(content) < end:
        raise AgainError(f"the connection to {response.url.host} ended after {len(content)} of {end} bytes")


def _etag(response: aiohttp.ClientResponse) -> str:
    etag = response.headers.get("ETag", "")
    return "" if etag.startswith("W/") or len(etag) > _MAX_ETAG_CHARS else etag
