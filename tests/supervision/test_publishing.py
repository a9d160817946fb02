"""What the registry is told of pools: what the configuration knows before any start, and their part of the GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pool_managerd.config import PolicyConfig, PoolConfig
from pool_managerd.core.gpu.ledger import Reservation, account
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Instance
from pool_managerd.core.registry import PerfHints
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.supervision.publishing import GpuFigures, registry_fields
from pool_managerd.supervision.workers import Launch
from tests.core.gpus import GIB, gpu, process


def figures(*devices: Any, promised: dict[str, dict[int, int]], exclusive: str = "", owners: dict[int, str] | None = None) -> Any:
    """``promised``: GiB by pool and index."""
    ledger = [
        Reservation(InstanceId(pool), 1, {devices[index].uuid: gib * GIB for index, gib in parts.items()}, pool == exclusive)
        for pool, parts in promised.items()
    ]
    found = GpuFigures(account(devices, ledger, {pid: InstanceId(pool) for pid, pool in (owners or {}).items()}))
    return lambda pool, *indices: found.of(pool, tuple(devices[index].uuid for index in indices))


def test_a_pool_is_told_its_own_part_of_each_gpu_and_what_is_left_for_it() -> None:
    shared = gpu(1, 12, free_gib=3, processes=(process(41, 2), process(42, 7)))
    see = figures(gpu(0, 24), shared, promised={"large": {0: 6, 1: 3}, "code": {1: 7}}, owners={41: "large", 42: "code"})
    large, other = see("large", 0, 1), see("other", 0, 1)
    assert [(s.vram_reserved_bytes, s.vram_used_bytes) for s in large["devices"]] == [(6 * GIB, None), (3 * GIB, 2 * GIB)]
    assert (large["vram_reserved_bytes"], large["vram_used_bytes"]) == (9 * GIB, None)
    assert large["vram_available_bytes"] == other["vram_available_bytes"] == 20 * GIB
    assert (other["vram_reserved_bytes"], other["vram_used_bytes"]) == (0, 0)
    assert other is see("third", 0, 1), "pools that hold nothing share their figures"
    code = see("code", 1)
    assert (code["vram_reserved_bytes"], code["vram_used_bytes"], code["vram_free_bytes"]) == (7 * GIB, 7 * GIB, 3 * GIB)
    assert set(see("nobody").values()) == {None, ()}


def test_nothing_is_left_for_others_where_a_pool_is_exclusive_not_on_its_siblings_either() -> None:
    whole = replace(gpu(0, 80), mig_enabled=True)
    slices = [replace(gpu(n, 20), parent_uuid=whole.uuid, uuid=f"MIG-{n}") for n in (1, 2)]
    see = figures(whole, *slices, gpu(3, 24), promised={"picky": {1: 5}}, exclusive="picky")
    assert see("other", 1, 2, 3)["vram_available_bytes"] == 24 * GIB
    assert [s.vram_available_bytes for s in see("picky", 1, 2)["devices"]] == [15 * GIB, 0]


def test_of_a_gpu_that_cannot_be_read_nothing_is_free_nor_used() -> None:
    see = figures(replace(gpu(0, 12, free_gib=9), error="GPU_IS_LOST (15)"), gpu(1, 24), promised={"a": {0: 2}})
    found = see("a", 0, 1)
    assert (found["vram_total_bytes"], found["vram_free_bytes"], found["vram_available_bytes"]) == (36 * GIB, 24 * GIB, 24 * GIB)
    assert (found["devices"][0].vram_free_bytes, found["devices"][0].vram_used_bytes) == (None, None)
    assert see("a", 0)["vram_free_bytes"] is None


def told(launch: Launch | None = None, **config: Any) -> dict[str, Any]:
    pool = PoolConfig(id="a", engine="llamacpp", **config)
    return registry_fields(Instance("a"), launch or Launch(), pool, 0, "node-1", ModelProvisioner(Path(), PolicyConfig()).id_of)


def test_what_is_configured_is_known_before_the_first_start() -> None:
    found = told(model="file:models/../m.gguf", devices=["GPU1", 0], ctx=4096, quant="Q4_K_M")
    assert (found["device_mask"], found["ctx_max"], found["quant"]) == ("1,0", 4096, "Q4_K_M")
    assert (found["model_id"], found["node_id"], found["replica_id"]) == ("file:m.gguf", "node-1", "r0")
    assert found["perf_hints"] == PerfHints(None, None, ("Q4_K_M",))
    free = told(model="m.gguf")
    assert (free["device_mask"], free["ctx_max"], free["quant"], free["model_id"]) == (None, None, None, "file:m.gguf")
    assert "perf_hints" not in free


@pytest.mark.parametrize("ref", ["hf:org/repo/f.gguf", "sha256:" + "0" * 64, "https://example.org/m.gguf"])
def test_a_model_that_is_no_file_is_known_by_its_reference(ref: str) -> None:
    assert told(model=ref)["model_id"] == ref


def test_a_quantisation_that_was_read_from_the_model_is_told_with_what_was_measured() -> None:
    sizing = SimpleNamespace(inputs=SimpleNamespace(shape=SimpleNamespace(quantization="Q8_0", ctx_train=8192)))
    launch = Launch(sizing=cast("Any", sizing), tokens_per_s=90.0, first_token_ms=5.0)
    found = told(launch, model="m.gguf")
    assert (found["quant"], found["perf_hints"]) == ("Q8_0", PerfHints(90.0, 5.0, ("Q8_0",)))
