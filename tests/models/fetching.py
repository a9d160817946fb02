"""A provisioner that fetches, for tests: impatient, from servers on loopback."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yarl import URL

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import PoolError
from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.download import Persistence
from pool_managerd.models.elsewhere import Elsewhere, Obstacle
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.hub_access import HubAccess
from pool_managerd.models.importing import Importer
from pool_managerd.models.places import Place
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.models.shelf import Shelf
from pool_managerd.models.used_notes import UsedNotes
from pool_managerd.models.web import Web

LOOPBACK: dict[str, Any] = {
    "allow_network": True, "allow_schemes": ["file", "hf", "http", "https"], "allow_domains": ["127.0.0.1"],
}  # fmt: skip


@dataclass
class Waits:
    """Takes the place of sleeping: what would have been waited for."""

    seconds: list[float] = field(default_factory=list)

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@dataclass
class Fetching:
    """``models`` fetch into ``cache`` below ``folder``."""

    folder: Path
    models: ModelProvisioner
    cache: ModelCache
    fetcher: Fetcher
    web: Web
    waits: Waits
    shelf: Shelf
    told: list[str]

    async def refusal(self, ref: str, digest: str | None = None) -> PoolError:
        try:
            await self.models.ensure_present(ref, digest)
        except PoolError as problem:
            return problem
        raise AssertionError("it was not refused")

    def parts(self) -> list[Path]:
        return sorted((self.cache.root / "partial").glob("*.part"))


@asynccontextmanager
async def fetching(
    folder: Path, hub: str = "https://hub.invalid", *, token: str | None = None, tls: ssl.SSLContext | None = None,
    stall_s: float = 30, keep_free: int = 0, policy: dict[str, Any] | None = None, proxy: str | None = None,
    bytes_per_s: int | None = None, logins: Callable[[str], str | None] = lambda _host: None,
    buckets: BucketAccess | None = None, places: Sequence[Place] = (), obstacle: Obstacle = lambda _: None, **persistence: Any,
) -> AsyncIterator[Fetching]:  # fmt: skip
    waits, told = Waits(), list[str]()
    rules = PolicyConfig.model_validate(LOOPBACK | (policy or {}))
    how = Persistence(**{"sleep": waits, **persistence})
    digests, cache = DigestCache(), ModelCache(folder / "cache")
    access = HubAccess(URL(hub), token)
    web = Web(
        lambda: rules, access, stall_s=stall_s, tls=tls, proxy=proxy, bytes_per_s=bytes_per_s, logins=logins, buckets=buckets
    )
    fetcher = Fetcher(cache, web, keep_free, digests, how)
    try:
        models = ModelProvisioner(folder, rules, cache, fetcher, digests)
        models.elsewhere = Elsewhere(places, UsedNotes(cache), digests, obstacle, told.append)
        shelf = Shelf(cache, fetcher, lambda: rules, models.elsewhere, Importer(cache, fetcher.room, digests))
        yield Fetching(folder, models, cache, fetcher, web, waits, shelf, told)
    finally:
        await fetcher.close()
