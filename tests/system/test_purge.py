"""A purge of a pool with a real engine, through the library, and of one as a stranger asks for it over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pool_managerd import PoolManager, PreloadOutcome, PurgeRequest, RequestError
from tests.system.daemons import Daemon
from tests.system.nodes import config


async def test_nothing_is_left_of_a_real_engine_but_its_model(open_dir: Path, tiny_model: Path) -> None:
    provisioning: dict[str, Any] = {"mode": "package", "flags": ["--threads", "1"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False})) as node:
        await PreloadOutcome.execute("p", node)
        work, cache, outside = open_dir / "run/work/p", open_dir / "run/cache/p", open_dir / "outside"
        outside.mkdir()
        (outside / "kept").write_bytes(b"x" * 10_000)
        (cache / "kernels").write_bytes(b"x" * 1_000_000)
        (cache / "link").symlink_to(outside)
        (work / "link").symlink_to("../../../outside")
        request = PurgeRequest("p", delete_cache_dirs=True)
        plan = await node.plan_purge(request)
        assert plan["stops_by"] == "drain" and plan["would_free_bytes"] >= 1_000_000 and node.status("p")["ready"]
        with pytest.raises(RequestError, match="is a file of yours"):
            await node.purge(PurgeRequest("p", purge_models=(f"file:{tiny_model}",), force=True))
        assert node.status("p")["ready"] and tiny_model.exists()
        found = await (await node.purge(request)).wait()
        assert found["freed_bytes"] >= 1_000_000 and {row["path"] for row in found["removed"]} == {str(work), str(cache)}
        assert not work.exists() and not cache.exists() and (outside / "kept").exists() and tiny_model.exists()
        status = node.status("p")
        assert (status["state"], status["live"], status["pid"]) == ("uninitialized", False, None)
        await PreloadOutcome.execute("p", node)
        assert node.status("p")["epoch"] == status["epoch"] + 1 and work.exists()


def test_who_asks_over_http_is_told_what_would_be_freed_and_then_what_was(open_dir: Path) -> None:
    daemon = Daemon(open_dir / "d")
    try:
        daemon.start().preload("p")
        (daemon.run / "cache/p/kernels").write_bytes(b"x" * 100_000)
        lease = daemon.post("/v1/pools/p/leases")[1]["lease_id"]
        url = "/v1/pools/p/purge"
        assert daemon.post(url, {"drain_first": False})[1]["code"] == "POOL_IN_USE"
        assert daemon.post(url, {"purge_engine": True})[1]["code"] == "NOT_OURS"
        assert daemon.post(url, {"delete": True})[0] == 400 and daemon.post("/v1/pools/x/purge", {})[0] == 404
        code, plan = daemon.post(f"{url}?dry_run=true", {"delete_cache_dirs": True})
        assert code == 200 and plan["would_free_bytes"] >= 100_000 and daemon.status()["ready"], plan
        code, accepted = daemon.post(url, {"delete_cache_dirs": True})
        assert code == 202 and accepted["kind"] == "purge"
        daemon.until(lambda status: bool(status["draining"]), "the drain")
        daemon.delete(f"/v1/pools/p/leases/{lease}")
        daemon.until(lambda status: status["state"] == "uninitialized", "the purge")
        found = daemon.get(f"/v1/operations/{accepted['operation_id']}")[1]
        assert found["status"] == "succeeded" and found["outcome"]["freed_bytes"] == plan["would_free_bytes"], found
        assert not (daemon.run / "cache/p").exists() and daemon.lines("purged")
        code, done = daemon.post(f"{url}?wait=true", {"force": True})
        assert code == 200 and done["outcome"] == {"pool_id": "p", "removed": [], "freed_bytes": 0}, done
    finally:
        daemon.end()
