"""A hub of models and a plain web server, in this process on loopback: what they answer can be scripted, request by request."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

COMMIT = "c0ffee" + "0" * 34
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Asked:
    """A request that came."""

    path: str
    range: str | None
    if_range: str | None
    authorization: str | None


@dataclass
class Hub:
    """``files`` are served under ``/ORG/REPO/resolve/COMMIT/PATH`` and ``/PATH``; ``script`` answers the first requests for
    content instead, one each (None: as usual). ``in_git`` are small files, of which the hub says no sha256.

    Requests for a beginning (``bytes=0-999``) are counted in ``heads``, and answered by ``head_script``. ``served`` counts the
    bytes of their answers, ``connections`` the clients' ports.
    """

    repository: str = "org/repo"
    files: dict[str, bytes] = field(default_factory=dict)
    script: list[Answer | None] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    head_script: list[Answer | None] = field(default_factory=list)
    always_head: Answer | None = None
    heads: list[Asked] = field(default_factory=list)
    served: int = 0
    connections: set[int] = field(default_factory=set)
    etag: str = '"1"'
    token: str | None = None
    digests: dict[str, str] = field(default_factory=dict)
    in_git: set[str] = field(default_factory=set)
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self, tls: ssl.SSLContext | None = None, port: int = 0) -> Hub:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{repo}/revision/{revision}", self._listing)
        app.router.add_get("/{path:.*}", self._content)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls)
        await site.start()
        address = self._runner.addresses[0]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{address[1]}"
        return self

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def content(self, path: str) -> bytes | None:
        return self.files.get(path.removeprefix(f"{self.repository}/resolve/{COMMIT}/"))

    async def _listing(self, request: web.Request) -> web.StreamResponse:
        refused = self._note(request)
        if refused is not None:
            return refused
        if f"{request.match_info['org']}/{request.match_info['repo']}" != self.repository:
            return web.Response(status=404)
        return web.json_response({"sha": COMMIT, "siblings": [self._told(*file) for file in self.files.items()]})

    def _told(self, path: str, body: bytes) -> dict[str, object]:
        if path in self.in_git:
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
            return {"rfilename": path, "size": len(body), "blobId": self.digests.get(path, blob)}
        large = {"sha256": self.digests.get(path, hashlib.sha256(body).hexdigest()), "size": len(body)}
        return {"rfilename": path, "size": len(body), "blobId": "0" * 40, "lfs": large}

    def _note(self, request: web.Request, among: list[Asked] | None = None) -> web.Response | None:
        headers = request.headers
        given = headers.get("Authorization")
        if request.transport is not None:
            self.connections.add(request.transport.get_extra_info("peername")[1])
        (self.asked if among is None else among).append(Asked(request.path, headers.get("Range"), headers.get("If-Range"), given))
        return web.Response(status=401) if self.token is not None and given != f"Bearer {self.token}" else None

    async def _content(self, request: web.Request) -> web.StreamResponse:
        if first_and_last(request) is not None:
            return await self._head(request)
        refused = self._note(request)
        if refused is not None:
            return refused
        scripted = self.script.pop(0) if self.script else None
        return await (scripted or self.usual)(request)

    async def _head(self, request: web.Request) -> web.StreamResponse:
        refused = self._note(request, self.heads)
        if refused is not None:
            return refused
        scripted = self.head_script.pop(0) if self.head_script else None
        return await (scripted or self.always_head or self.usual_head)(request)

    async def usual_head(self, request: web.Request) -> web.StreamResponse:
        body, asked = self.content(request.match_info["path"]), first_and_last(request)
        if body is None or asked is None:
            return web.Response(status=404)
        part = body[asked[0] : asked[1] + 1]
        self.served += len(part)
        told = f"bytes {asked[0]}-{asked[0] + len(part) - 1}/{len(body)}"
        return web.Response(status=206, body=part, headers={"ETag": self.etag, "Content-Range": told})

    async def usual(self, request: web.Request) -> web.StreamResponse:
        """As a web server does: ranges, and an ETag that makes them void when it has changed."""
        body = self.content(request.match_info["path"])
        if body is None:
            return web.Response(status=404)
        start = first_byte(request)
        if start and request.headers.get("If-Range", self.etag) != self.etag:
            start = 0
        headers = {"ETag": self.etag}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return web.Response(status=206 if start else 200, body=body[start:], headers=headers)

    # --- what may go wrong ---

    def cut_after(self, count: int) -> Answer:
        """The connection is reset after so many bytes."""

        async def answer(request: web.Request) -> web.StreamResponse:
            body = (self.content(request.match_info["path"]) or b"")[first_byte(request) :]
            response = await self.begun(request, len(body))
            await response.write(body[:count])
            await asyncio.sleep(0.05)  # what is not taken yet is lost with a connection
            assert request.transport is not None
            request.transport.abort()
            return response

        return answer

    def held_after(self, count: int, gate: asyncio.Event, reached: asyncio.Event | None = None) -> Answer:
        """Nothing more comes after so many bytes until the gate opens."""

        async def answer(request: web.Request) -> web.StreamResponse:
            body = (self.content(request.match_info["path"]) or b"")[first_byte(request) :]
            response = await self.begun(request, len(body))
            await response.write(body[:count])
            if reached is not None:
                reached.set()
            await gate.wait()
            await response.write(body[count:])
            return response

        return answer

    async def begun(self, request: web.Request, length: int) -> web.StreamResponse:
        start = first_byte(request)
        response = web.StreamResponse(status=206 if start else 200, headers={"ETag": self.etag})
        response.content_length = length
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{start + length}"
        await response.prepare(request)
        return response


def first_byte(request: web.Request) -> int:
    found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    return int(found[1]) if found else 0


def first_and_last(request: web.Request) -> tuple[int, int] | None:
    """Of a range that has an end."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    return (int(found[1]), int(found[2])) if found else None


def status(code: int, **headers: str) -> Answer:
    """An answer without content."""

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


def redirect(location: str) -> Answer:
    return status(302, Location=location)
