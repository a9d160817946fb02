"""The library's front door: names, laziness, and the registry with the system's time."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import pool_managerd
from pool_managerd import Registry


def test_every_public_name_can_be_imported() -> None:
    for name in pool_managerd.__all__:
        assert getattr(pool_managerd, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pool_managerd.no_such_name


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, pool_managerd; print([m for m in ('aiohttp', 'pydantic', 'asyncio') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert ran.stdout.strip() == "[]"


def test_a_registry_of_ones_own_keeps_real_time() -> None:
    registry = Registry()
    registry.register_ready_from_handoff("p", {"slots_total": 2})
    heartbeat = registry.get_heartbeat("p")
    assert heartbeat is not None and abs(heartbeat - time.time() * 1000) < 1_000
    assert registry.allocate_lease("p") == 1


def test_lease_ids_of_two_registries_differ() -> None:
    assert Registry().grant("p").lease_id != Registry().grant("p").lease_id
