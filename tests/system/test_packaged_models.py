"""A pool whose model is in an image of a container registry: fetched, unpacked and run by a real engine."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from pool_managerd import PoolManager
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.leftovers import bytes_on_disk
from tests.models.registry_app import Registry
from tests.system.nodes import config


async def test_a_model_in_an_image_is_run_and_its_archive_does_not_stay(open_dir: Path, smol_model: Path) -> None:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(smol_model, f"models/smol/{smol_model.name}")
    registry = await Registry(name="org/smol").start()
    try:
        registry.put_image("1", layer.getvalue(), kind="application/vnd.oci.image.layer.v1.tar")
        pool = {
            "id": "smol", "engine": "llamacpp", "model": f"oci://{registry.host}/org/smol:1", "ctx": 512, "slots": 1,
            "preload": False, "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
        }  # fmt: skip
        policy = {"allow_network": True, "allow_schemes": ["oci", "http"], "allow_domains": ["127.0.0.1"]}
        models = {"cache_dir": open_dir / "models", "keep_free_bytes": 0}
        async with PoolManager(config(open_dir, pool, policy=policy, models=models)) as node:
            await node.ensure_ready("smol")
            assert "Unpacking the model of pool 'smol'" in node.events.recent("fetch")[-1].human
            (row,) = await node.models()
            assert row["path"].endswith(f"-all/{smol_model.name}") and row["verified"] and row["pools"] == ["smol"]
            assert Path(row["path"]).read_bytes() == smol_model.read_bytes()
            assert bytes_on_disk(ModelCache(open_dir / "models")) == smol_model.stat().st_size
    finally:
        await registry.close()
