"""Who may have an engine of their own run, and under which names."""

from __future__ import annotations

from pool_managerd.config import Config, is_pool_id, split_address
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import RequestError, SpecError


def check_submission(config: Config, pool_id: str, engine: PreparedEngine) -> None:
    """Raises SpecError for the pool id, RequestError POLICY_DENIED for an engine that must not run here (DESIGN §7)."""
    check_pool_id(pool_id)
    profile, host = config.profile, split_address(config.daemon.bind)[0]
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    listed = engine.binary_path in config.policy.engine_allowlist
    if not (profile == "dev" or (profile == "home" and loopback) or listed):
        raise RequestError(
            f"cannot run a submitted engine in profile {profile} on {host}",
            code="POLICY_DENIED", status=403, pool_id=pool_id,
            hint="put the binary's path on policy.engine_allowlist",
        )  # fmt: skip


def check_pool_id(pool_id: str) -> None:
    """Raises SpecError when ``pool_id`` cannot name a pool."""
    if not is_pool_id(pool_id):
        raise SpecError(f"cannot use {pool_id[:64]!r} as a pool id", hint="1 to 63 letters, digits, '.', '_' or '-'")
