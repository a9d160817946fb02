"""A pool's configuration with some keys changed, as its file would say it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pool_managerd.config.load import load_values
from pool_managerd.config.pools import PoolConfig
from pool_managerd.errors import SpecError

FIXED = ("id", "engine")


def with_changes(pool: PoolConfig, changes: Mapping[str, Any], base_dir: Path) -> PoolConfig:
    """``pool`` with ``changes``: keys as in the file, sections key by key; null for a key that is as if it were not written.

    Raises SpecError (CONFIG_ERROR) as loading a file does.
    """
    if fixed := next((key for key in FIXED if key in changes), None):
        raise SpecError(
            f"cannot change {fixed!r} of pool {pool.id}", code="CONFIG_ERROR", pool_id=pool.id, hint="make it another pool"
        )
    values = _written(merged(pool.model_dump(mode="json", exclude_unset=True), changes))
    try:
        return load_values({"pools": [values]}, base_dir).pools[0]
    except SpecError as problem:
        text = problem.message.replace("pools[0].", "").replace("pools[0]: ", "")
        raise SpecError(text, code=problem.code, pool_id=pool.id, hint="see docs/reference/config.md for every key") from None


def digest_of(pool: PoolConfig) -> str:
    """Tells whether the file still says the same of a pool."""
    return hashlib.sha256(json.dumps(pool.model_dump(mode="json", exclude_unset=True), sort_keys=True).encode()).hexdigest()


def differences(old: PoolConfig, new: PoolConfig) -> list[dict[str, Any]]:
    """The keys that are not the same: ``{key, old, new}``, as they are written."""
    before, after = (dict(_leaves(pool.model_dump(mode="json"))) for pool in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        {"key": key, "old": before.get(key), "new": after.get(key)}
        for key in keys
        if before.get(key) != after.get(key) and not (_filled(key, before, after) or _filled(key, after, before))
    ]


def _filled(key: str, empty: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """An empty map that has keys in ``other``: those say it all."""
    return empty.get(key) == {} and any(one.startswith(f"{key}.") for one in other)


def merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` and then ``changes``, section by section."""
    new = dict(old)
    for key, value in changes.items():
        before = new.get(key)
        new[key] = merged(before, value) if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return new


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, as if it were not written."""
    return {key: _written(value) if isinstance(value, Mapping) else value for key, value in values.items() if value is not None}


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping) and part:
            yield from _leaves(part, f"{path}{key}.")
        else:
            yield f"{path}{key}", part
