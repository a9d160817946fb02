"""A container registry with one repository, in this process on loopback: artifacts, a token service, blobs that lie elsewhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

DOCKER_GGUF = "application/vnd.docker.ai.gguf.v3"


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@dataclass
class Registry:
    """``realm``: tokens are asked for there, ``login`` is what the token service wants to see; ``elsewhere``: where blobs are."""

    name: str = "ai/tiny"
    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    realm: str | None = None
    login: str | None = None
    basic: str | None = None
    elsewhere: str | None = None
    tokens: int = 0
    """How many were given out: the last one opens the repository."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Paths, and what was shown."""
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self) -> Registry:
        app = web.Application()
        app.router.add_get("/token", self._token)
        app.router.add_get("/v2/{name:.+}/manifests/{wanted}", self._manifest)
        app.router.add_get("/v2/{name:.+}/blobs/{digest}", self._blob)
        app.router.add_get("/stored/{digest}", self._stored)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def put(self, tag: str, *layers: tuple[bytes, str, str | None], index: bool = False) -> str:
        """An artifact of layers (content, media type, name); its digest."""
        described: list[dict[str, Any]] = []
        for body, kind, name in layers:
            self.blobs[digest_of(body)] = body
            named = {} if name is None else {"annotations": {"org.cncf.model.filepath": name}}
            described.append({"mediaType": kind, "digest": digest_of(body), "size": len(body), **named})
        manifest = json.dumps({"schemaVersion": 2, "layers": described}).encode()
        self.manifests[digest_of(manifest)] = manifest
        if index:
            self.manifests[tag] = json.dumps({"schemaVersion": 2, "manifests": [{"digest": digest_of(manifest)}]}).encode()
        else:
            self.manifests[tag] = manifest
        return digest_of(manifest)

    def put_image(self, tag: str, *layers: bytes, kind: str = "application/vnd.oci.image.layer.v1.tar+gzip") -> str:
        """An image of these layers, as build tools push it: in an index, with what they attest beside it; its digest."""
        self.put("image", *((layer, kind, None) for layer in layers))
        image = self.manifests.pop("image")
        attested = {"digest": digest_of(b"attested"), "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
        listed = [{"digest": digest_of(image), "platform": {"os": "linux", "architecture": "amd64"}}, attested]
        self.manifests[tag] = json.dumps({"schemaVersion": 2, "manifests": listed}).encode()
        return digest_of(image)

    def _refused(self, request: web.Request) -> web.Response | None:
        shown = request.headers.get("Authorization")
        self.asked.append((request.path, shown))
        if self.basic is not None and shown != self.basic:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="here"'})
        if self.realm is not None and (self.tokens == 0 or shown != f"Bearer token-{self.tokens}"):
            challenge = f'Bearer realm="{self.realm}",service="tests",scope="repository:other:push"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return None

    async def _token(self, request: web.Request) -> web.Response:
        shown = request.headers.get("Authorization")
        self.asked.append((request.path_qs, shown))
        if self.login is not None and shown != self.login:
            return web.Response(status=401)
        self.tokens += 1
        return web.json_response({"token": f"token-{self.tokens}"})

    async def _manifest(self, request: web.Request) -> web.Response:
        found = self.manifests.get(request.match_info["wanted"])
        if (refused := self._refused(request)) is not None:
            return refused
        if found is None or request.match_info["name"] != self.name:
            return web.Response(status=404)
        return web.Response(body=found)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        if (refused := self._refused(request)) is not None:
            return refused
        if self.elsewhere is not None:
            return web.Response(status=307, headers={"Location": f"{self.elsewhere}/stored/{digest}"})
        return self._content(request, digest)

    async def _stored(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, request.headers.get("Authorization")))
        return self._content(request, request.match_info["digest"])

    def _content(self, request: web.Request, digest: str) -> web.Response:
        body = self.blobs.get(digest)
        if body is None:
            return web.Response(status=404)
        begin = request.http_range.start or 0
        if not begin:
            return web.Response(body=body)
        told = {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
        return web.Response(status=206, body=body[begin:], headers=told)
