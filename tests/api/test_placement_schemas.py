"""The documented shape of the snapshots is the one that is answered."""

from __future__ import annotations

import dataclasses
import json

from pool_managerd.api import placement_schemas as schemas
from pool_managerd.core.registry import DeviceShare, PerfHints, PoolSnapshot, Registry
from tests.api.conftest import Served


def test_every_field_of_a_pool_is_documented_and_passes() -> None:
    registry = Registry(lambda: 0)
    share = DeviceShare(0, "0", "GPU-0", None, 24, None, 3, 2, None)
    registry.publish("a", node_id="n", devices=(share,), perf_hints=PerfHints(90.0, None, ("Q8_0",)))
    told = json.loads(json.dumps(registry.snapshots()[0].to_dict()))
    schemas.PoolSnapshot.model_validate(told, strict=True)
    pairs = ((schemas.PoolSnapshot, PoolSnapshot), (schemas.DeviceShare, DeviceShare), (schemas.PerfHints, PerfHints))
    for documented, answered in pairs:
        assert set(documented.model_fields) == {field.name for field in dataclasses.fields(answered)}


async def test_the_snapshots_say_how_old_the_figures_of_the_gpus_are(api: Served) -> None:
    api.node.pools.clear()
    api.node.devices_problem = {"code": "nvml_hung", "message": "the GPU driver did not answer", "hint": ""}
    status, body = await api.call("GET", "/v1/snapshots")
    assert (status, body["devices_stale"], body["devices_age_ms"]) == (200, True, 17_000)
    schemas.Snapshots.model_validate(body, strict=True)
    assert set(schemas.Snapshots.model_fields) == body.keys()
