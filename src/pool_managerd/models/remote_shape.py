"""The shape of a model that lies elsewhere, from the headers of its files: a few megabytes of however many gigabytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import SpecError
from pool_managerd.models.ahead_notes import Ahead, AheadFile
from pool_managerd.models.fetch_rules import shown
from pool_managerd.models.gguf import refused
from pool_managerd.models.remote import RemoteFile, RemoteModel
from pool_managerd.models.remote_head import LARGE_STEPS, SMALL_STEPS, Head, read_head
from pool_managerd.models.web import Web

AT_ONCE = 4
_T = TypeVar("_T")


class UnusableError(Exception):
    """No engine could use it. ``message`` says why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ShapeReading:
    """Of one model."""

    def __init__(self, remote: RemoteModel, web: Web) -> None:
        self._remote, self._web = remote, web
        self._seen: dict[str, Head] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def shape(self) -> ModelShape | None:
        """None of what is no GGUF, and where a header is too long. Raises AgainError, PoolError and UnusableError."""
        files = self._remote.files
        return await self._gguf(files) if files[0].name.lower().endswith(".gguf") else None

    def ahead(self, shape: ModelShape | None, problem: str = "") -> Ahead:
        """What was read, as it is kept."""
        remote, unseen = self._remote, Head(-1, b"")
        seen = ((file, self._seen.get(file.name, unseen)) for file in remote.files)
        files = tuple(
            AheadFile(file.name, file.size if head is unseen else head.size, file.sha256, head.etag) for file, head in seen
        )
        return Ahead(remote.ref.id, remote.folder, remote.source, files, shape, problem=problem)

    async def _gguf(self, files: Sequence[RemoteFile]) -> ModelShape | None:
        from pool_managerd.models.gguf_header import GgufHeader, parse_gguf_header
        from pool_managerd.models.gguf_shape import shape_of_headers

        def parse(file: RemoteFile) -> Callable[[Head], GgufHeader]:
            return lambda head: parse_gguf_header(shown(file.url), head)

        first = await self._read(files[0], parse(files[0]), LARGE_STEPS)
        if first is None:
            return None
        told = first.values.get("split.count")
        count = told if isinstance(told, int) and told > 1 else 1
        if count != len(files):
            why = f"its header says that it has {count} parts, and its name means {len(files)}"
            raise UnusableError(refused(shown(files[0].url), why).message)
        rest = await _all([self._read(file, parse(file), SMALL_STEPS) for file in files[1:]])
        headers = [first, *(header for header in rest if header is not None)]
        return shape_of_headers(headers) if len(headers) == len(files) else None

    async def _read(self, file: RemoteFile, parse: Callable[[Head], _T], steps: tuple[int, ...]) -> _T | None:
        async with self._turns:
            found = await read_head(file, self._web, partial(_usable, parse), steps)
        if found is None:
            return None
        head, parsed = found
        self._seen[file.name] = Head(head.size, b"", head.etag)
        return parsed


def _usable(parse: Callable[[Head], _T], head: Head) -> _T:
    """What it parses to. Raises UnusableError."""
    try:
        return parse(head)
    except SpecError as problem:
        raise UnusableError(problem.message) from problem


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Their results; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except* Exception as problems:  # noqa: BLE001 - unpacked, not handled
        raise problems.exceptions[0] from None
    return [task.result() for task in tasks]
