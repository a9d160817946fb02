"""The routes about GPUs, and preflight."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from yarl import URL

from pool_managerd.api import openapi, schemas
from tests.api.conftest import Served
from tests.api.fake_devices import UUID_1, devices, gone_device, lost_device


@pytest.mark.parametrize("prefix", ["/v1", "/v2"])
async def test_devices_are_answered_as_the_node_sees_them(api: Served, prefix: str) -> None:
    status, body = await api.call("GET", f"{prefix}/devices")
    assert status == 200
    assert body == api.node.devices()
    schemas.Devices.model_validate(body, strict=True)
    schemas.Devices.model_validate(devices(lost_device(), gone_device(device=UUID_1)), strict=True)
    assert set(body["devices"][0]) == set(schemas.Device.model_fields)


@pytest.mark.parametrize("device", ["1", "GPU1", UUID_1])
async def test_a_device_is_cordoned_by_index_or_uuid_and_its_row_comes_back(api: Served, device: str) -> None:
    status, row = await api.call("POST", f"/v1/devices/{device}/cordon")
    assert (status, row["device"], row["cordoned"]) == (200, "1", True)
    status, row = await api.call("POST", f"/v2/devices/{device}/uncordon", json={})
    assert (status, row["cordoned"]) == (200, False)
    named = device.removeprefix("GPU") if device == "GPU1" else device
    assert api.node.device_calls == [("cordon", named), ("uncordon", named)]


async def test_the_uuid_of_an_old_mig_instance_holds_slashes(api: Served) -> None:
    uuid = "MIG-GPU-11111111-2222-3333-4444-555555555555/1/0"
    api.node.answer["devices"][1] |= {"uuid": uuid, "device": uuid}
    status, row = await api.call("POST", f"/v1/devices/{quote(uuid, safe='')}/cordon")
    assert (status, row["uuid"], row["cordoned"]) == (200, uuid, True)


async def test_the_document_says_what_may_name_a_device() -> None:
    operation = openapi.document()["paths"]["/v1/devices/{device}/cordon"]["post"]
    (parameter,) = operation["parameters"]
    assert [bool(re.search(parameter["schema"]["pattern"], given)) for given in ("0", "GPU3", UUID_1, "../x", "")] == [
        True, True, True, False, False,
    ]  # fmt: skip


async def test_an_unknown_device_is_a_404_that_lists_what_exists(api: Served) -> None:
    status, body = await api.call("POST", "/v1/devices/9/cordon")
    assert (status, body["code"], body["message"]) == (404, "DEVICE_NOT_FOUND", "device 9 not found: there are 0, 1")


@pytest.mark.parametrize("bad", ["..", "-1", "1e3", "x" * 300, "0%00", "0%0a", "GPU-", "..%2f..%2fetc", "%d9%a1", "00000"])
async def test_what_cannot_name_a_device_never_reaches_the_node(api: Served, bad: str) -> None:
    url = URL(f"{api.url}/v1/devices/{bad}/cordon", encoded=True)
    async with api.session.post(url) as response:
        assert response.status == 404
        assert len(await response.text()) < 500
    assert api.node.device_calls == []


async def test_nvml_is_let_go_and_taken_up_again(api: Served) -> None:
    status, body = await api.call("POST", "/v1/devices/release")
    assert (status, body["stale"], body["problem"]["code"]) == (200, True, "released")
    status, body = await api.call("POST", "/v1/devices/resume")
    assert (status, body["stale"], body["problem"]) == (200, False, None)


async def test_preflight_answers_its_findings(api: Served) -> None:
    status, body = await api.call("POST", "/v1/preflight")
    assert (status, body["ok"], body["findings"]) == (200, True, api.node.findings)


@pytest.mark.parametrize(
    "path", ["/devices/0/cordon", "/devices/0/uncordon", "/devices/release", "/devices/resume", "/preflight"]
)
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"json": {"force": True}}, 400),
        ({"json": [1]}, 400),
        ({"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"data": b'{"a":1,"a":2}', "headers": {"Content-Type": "application/json"}}, 400),
    ],
)
async def test_their_bodies_must_be_empty(api: Served, path: str, options: dict[str, Any], status: int) -> None:
    assert (await api.call("POST", f"/v1{path}", **options))[0] == status
    assert api.node.device_calls == []


async def test_the_reads_are_no_bare_paths(api: Served) -> None:
    assert (await api.call("GET", "/devices"))[0] == 404
    assert (await api.call("GET", "/v1/devices/0/cordon"))[0] == 405
