"""What the shell offers for a half-typed id: what the daemon knows, or nothing, and never an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pool_managerd.cli.client import Daemon, find_daemon

_TIMEOUT_S = 0.5

Offer = list[tuple[str, str]]


def pool_ids(ctx: Any, incomplete: str) -> Offer:
    """Ids of pools, with their states, without those that stand on the line already."""
    given = {str(word) for value in ctx.params.values() if isinstance(value, (list, tuple)) for word in value}
    found = _asked(ctx, lambda node: [(row["pool_id"], row["state"]) for row in node.get("pools")], incomplete)
    return [offer for offer in found if offer[0] not in given]


def device_ids(ctx: Any, incomplete: str) -> Offer:
    """Indexes and UUIDs of GPUs and MIG instances."""

    def ask(node: Daemon) -> Offer:
        rows = node.get("devices")["devices"]
        names = {str(row[key]): f"{row['name']} {row['state']}" for key in ("device", "uuid") for row in rows}
        return list(names.items())

    return _asked(ctx, ask, incomplete)


def operation_ids(ctx: Any, incomplete: str) -> Offer:
    """Ids of operations, the newest first."""

    def ask(node: Daemon) -> Offer:
        rows = reversed(node.get("operations"))
        return [(row["operation_id"], f"{row['kind']} {row['pool_id']} {row['status']}") for row in rows]

    return _asked(ctx, ask, incomplete)


def _asked(ctx: Any, ask: Callable[[Daemon], Offer], incomplete: str) -> Offer:
    """What begins as typed. Whatever goes wrong (no daemon, no token, no configuration): nothing."""
    try:
        url, config = ctx.params.get("url"), ctx.params.get("config")
        node = find_daemon(url, None if config is None else Path(config), os.environ)
        return [offer for offer in ask(replace(node, timeout_s=_TIMEOUT_S)) if offer[0].startswith(incomplete)]
    except Exception:  # noqa: BLE001 - the shell's line editor is no place for errors
        return []
