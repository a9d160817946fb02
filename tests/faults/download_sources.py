"""Servers of every kind that models are fetched from, each behind a proxy that does harm."""

from __future__ import annotations

import hashlib
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.refs import parse_ref
from tests.faults.download_proxy import FaultProxy, fault_proxy
from tests.models.fetching import Fetching, fetching
from tests.models.hub_app import Hub
from tests.models.registry_app import DOCKER_GGUF, Registry, digest_of
from tests.models.test_buckets import KEYS, signature
from tests.models.test_repository import BESIDE, WEIGHTS, repository

BODY = b"GGUF\x03\x00\x00\x00" + random.Random(7).randbytes(300_000)
PARTS = {f"big-{n:05d}-of-00003.gguf": BODY[:200_000] + bytes([n]) * 50_000 for n in (1, 2, 3)}
TOKEN = "hf_of_nobody_else"
SECRET = "a-signature-that-opens-it"
POLICY = {"allow_schemes": ["https", "hf", "oci", "s3"], "allow_domains": ["127.0.0.1", "*.0.0.1"]}
KINDS = ("https", "https-unknown", "hf", "hf-folder", "hf-split", "oci", "s3")


@dataclass
class Source:
    """``ref`` behind ``proxy``, which harms the one file that is ``body``; ``files`` are all of it, by their names."""

    kind: str
    ref: str
    proxy: FaultProxy
    files: Mapping[str, bytes]
    body: bytes
    digest: str | None = None
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def is_vouched_for(self) -> bool:
        """Whether anybody has said what it has to be."""
        return self.kind != "https-unknown"

    @property
    def size_is_known(self) -> bool:
        return self.kind not in ("https", "https-unknown", "s3")

    @asynccontextmanager
    async def fetching(self, folder: Path, **more: Any) -> AsyncIterator[Fetching]:
        policy = POLICY | more.pop("policy", {})
        async with fetching(folder, self.proxy.url, policy=policy, token=TOKEN, **{**self.how, **more}) as f:
            yield f


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@dataclass(frozen=True)
class Tls:
    """What the proxy shows, and what the download trusts, which is in ``file``, too."""

    shown: ssl.SSLContext
    trusted: ssl.SSLContext
    file: Path


@asynccontextmanager
async def source(kind: str, tls: Tls) -> AsyncIterator[Source]:
    made = _bucket if kind == "s3" else _registry if kind == "oci" else _files
    async with made(kind, tls) as found:
        found.how |= {"tls": tls.trusted}
        yield found
        assert found.proxy.wrong == []


@asynccontextmanager
async def _files(kind: str, tls: Tls) -> AsyncIterator[Source]:
    ref, files, hit, in_git = _HUB[kind]
    hub = await Hub(files=dict(files), in_git=in_git, token=TOKEN if kind.startswith("hf") else None).start()
    try:
        async with fault_proxy(hub.url, hit, tls.shown) as proxy:
            wanted = (
                {name: body for name, body in hub.files.items() if name in (*BESIDE, *WEIGHTS)} if kind == "hf-folder" else files
            )
            digest = sha256(BODY) if kind == "https" else None
            yield Source(kind, ref(proxy.url), proxy, wanted, hub.files[hit], digest)
    finally:
        await hub.close()


_HUB: dict[str, tuple[Callable[[str], str], Mapping[str, bytes], str, set[str]]] = {
    "https": (lambda url: f"{url}/m.gguf", {"m.gguf": BODY}, "m.gguf", set()),
    "https-unknown": (lambda url: f"{url}/m.gguf", {"m.gguf": BODY}, "m.gguf", set()),
    "hf": (lambda _: "hf:org/repo:Q8_0", {"m-Q8_0.gguf": BODY}, "m-Q8_0.gguf", set()),
    "hf-folder": (lambda _: "hf:org/repo", repository(), WEIGHTS[1], set(BESIDE)),
    "hf-split": (lambda _: f"hf:org/repo/{next(iter(PARTS))}", PARTS, list(PARTS)[1], set()),
}


@asynccontextmanager
async def _registry(kind: str, tls: Tls) -> AsyncIterator[Source]:
    registry = await Registry().start()
    registry.put("1", (BODY, DOCKER_GGUF, None))
    try:
        async with fault_proxy(registry.url, digest_of(BODY), tls.shown) as proxy:
            registry.realm = f"{proxy.url}/token"
            yield Source(kind, f"oci://{URL(proxy.url).authority}/ai/tiny:1", proxy, {"tiny.gguf": BODY}, BODY)
    finally:
        await registry.close()


@asynccontextmanager
async def _bucket(kind: str, tls: Tls) -> AsyncIterator[Source]:
    """An object that is for those alone whose signature is right."""
    store = await Hub(files={"models/a/m.gguf": BODY}).start()

    async def signed(request: web.Request) -> web.StreamResponse:
        right = request.query.get("X-Amz-Signature") == signature(request)
        return await store.usual(request) if right else web.Response(status=403)

    store.script = [signed] * 99
    try:
        with pytest.MonkeyPatch.context() as env:
            async with fault_proxy(store.url, "m.gguf", tls.shown) as proxy:
                access, ref = BucketAccess.of(KEYS | {"AWS_ENDPOINT_URL": proxy.url}), "s3://models/a/m.gguf"
                for name, value in KEYS.items():
                    env.setenv(name, value)
                await access.opened(access.address(parse_ref(ref)))  # what signs opens descriptors of its own once
                yield Source(kind, ref, proxy, {"m.gguf": BODY}, BODY, sha256(BODY), {"buckets": access})
    finally:
        await store.close()
