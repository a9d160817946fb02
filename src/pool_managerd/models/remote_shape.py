"""The shape of a model that lies elsewhere, from the headers of its files: a few megabytes of however many gigabytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import SpecError
from pool_managerd.models.ahead_notes import Ahead, AheadFile
from pool_managerd.models.at_once import all_of
from pool_managerd.models.fetch_rules import shown
from pool_managerd.models.gguf import refused
from pool_managerd.models.remote import RemoteFile, RemoteModel
from pool_managerd.models.remote_head import LARGE_STEPS, SMALL_STEPS, Head, read_head
from pool_managerd.models.repository import CONFIG, MAX_CONFIG_BYTES, check_code, may_name_code
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
        self._config = b""
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def shape(self) -> ModelShape | None:
        """None of what is no GGUF, and where a header is too long. Raises AgainError, PoolError and UnusableError."""
        files = self._remote.files
        if self._remote.is_folder:
            return await self._folder(files[: self._remote.weights], files[self._remote.weights :])
        return await self._gguf(files) if files[0].name.lower().endswith(".gguf") else None

    def ahead(self, shape: ModelShape | None, problem: str = "") -> Ahead:
        """What was read, as it is kept."""
        remote, unseen = self._remote, Head(-1, b"")
        seen = ((file, self._seen.get(file.name, unseen)) for file in remote.files)
        files = tuple(
            AheadFile(file.name, file.size if head is unseen else head.size, file.sha256, head.etag) for file, head in seen
        )
        return Ahead(remote.ref.id, remote.folder, remote.source, files, shape, self._config.decode("utf-8", "replace"), problem)

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
        rest = await all_of([self._read(file, parse(file), SMALL_STEPS) for file in files[1:]])
        headers = [first, *(header for header in rest if header is not None)]
        return shape_of_headers(headers) if len(headers) == len(files) else None

    async def _folder(self, weights: Sequence[RemoteFile], beside: Sequence[RemoteFile]) -> ModelShape | None:
        """None of pickles, too: what is in them nobody can tell who does not load them."""
        from pool_managerd.models.safetensors_header import shape_of_headers, tensors_in

        for file in beside:
            if may_name_code(file.name) and (content := await self._read(file, _whole, (MAX_CONFIG_BYTES,))) is not None:
                check_code(self._remote.ref, file.name, content, self._web.policy)
                self._config = content if file.name == CONFIG else self._config
        if not weights[0].name.endswith(".safetensors") or not self._config:
            return None

        def parse(file: RemoteFile) -> Callable[[Head], Iterable[tuple[str, str, int]]]:
            return lambda head: tensors_in(shown(file.url), head)

        read = await all_of([self._read(file, parse(file), SMALL_STEPS) for file in weights])
        headers = [(file.name, tensors) for file, tensors in zip(weights, read, strict=True) if tensors is not None]
        if len(headers) != len(weights):
            return None
        try:
            return await asyncio.to_thread(shape_of_headers, self._config, headers)
        except SpecError as problem:
            raise UnusableError(problem.message) from problem

    async def _read(self, file: RemoteFile, parse: Callable[[Head], _T], steps: tuple[int, ...]) -> _T | None:
        async with self._turns:
            found = await read_head(file, self._web, partial(_usable, parse), steps)
        if found is None:
            return None
        head, parsed = found
        self._seen[file.name] = Head(head.size, b"", head.etag)
        return parsed


def _whole(head: Head) -> bytes:
    """Raises TooShortError."""
    return head.read(0, head.size, head.size)


def _usable(parse: Callable[[Head], _T], head: Head) -> _T:
    """What it parses to. Raises UnusableError."""
    try:
        return parse(head)
    except SpecError as problem:
        raise UnusableError(problem.message) from problem
