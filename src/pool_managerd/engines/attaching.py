"""Mode external: an engine that somebody else runs. It is probed and counted, never started, signalled or stopped."""

from __future__ import annotations

from urllib.parse import urlsplit

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AttachedEngine
from pool_managerd.errors import SpecError


def attached(pool: PoolConfig, health_path: str) -> AttachedEngine:
    """The running engine of ``pool``. Raises SpecError for a URL that is none."""
    return AttachedEngine(
        pool_id=pool.id,
        base_url=attach_url(pool),
        model_id=pool.model,
        engine=pool.engine,
        device_mask=None if pool.mask is None else str(pool.mask),
        slots_total=pool.slots,
        ctx=pool.ctx,
        health_path=health_path,
    )


def attach_url(pool: PoolConfig) -> str:
    """The validated base URL of a running engine. Raises SpecError."""
    url = pool.provisioning.url
    if not url:
        raise SpecError(
            "cannot attach: mode external needs provisioning.url", pool_id=pool.id, hint="set it, as http://127.0.0.1:8080"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not url.isprintable():
        raise SpecError(f"cannot attach to {url!r}: it is no base URL", pool_id=pool.id, hint="write it as http://127.0.0.1:8080")
    if parts.username or parts.password:
        raise SpecError("cannot attach: provisioning.url holds a password", pool_id=pool.id, hint="leave credentials out of URLs")
    return url.rstrip("/")
