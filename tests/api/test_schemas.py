"""The documented shape of the snapshots is the one that is answered."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pool_managerd.api import schemas
from pool_managerd.core.registry import DeviceShare, PerfHints, PoolSnapshot, Registry
from tests.api.conftest import Served


def test_every_field_of_a_pool_is_documented_and_passes() -> None:
    registry = Registry(lambda: 0)
    share = DeviceShare(0, "0", "GPU-0", None, 24, None, 3, 2, None)
    registry.publish("a", node_id="n", devices=(share,), perf_hints=PerfHints(90.0, None, ("Q8_0",)))
    told = {"version": 1, "taken_at_ms": 2, "devices_stale": False, "pools": [registry.snapshots()[0].to_dict()]}
    schemas.Snapshots.model_validate_json(json.dumps(told), strict=True)
    documented: dict[str, Any] = schemas.Snapshots.model_json_schema()["$defs"]
    for answered in (PoolSnapshot, DeviceShare, PerfHints):
        properties = documented[answered.__name__]["properties"]
        assert set(properties) == {field.name for field in dataclasses.fields(answered)}
    mask = documented["PoolSnapshot"]["properties"]["device_mask"]
    assert mask["description"] == "The devices that the pool may use, as configured; null: all."


async def test_the_snapshots_say_how_old_the_figures_of_the_gpus_are(api: Served) -> None:
    api.node.pools.clear()
    api.node.devices_problem = {"code": "nvml_hung", "message": "the GPU driver did not answer", "hint": ""}
    status, body = await api.call("GET", "/v1/snapshots")
    assert (status, body["devices_stale"], body["devices_age_ms"]) == (200, True, 17_000)
    schemas.Snapshots.model_validate_json(json.dumps(body), strict=True)
    assert set(schemas.Snapshots.model_fields) == body.keys()
