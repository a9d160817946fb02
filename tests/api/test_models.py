"""What is asked about the cache of models over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pool_managerd.api.model_schemas import CachedModel, GcAnswer
from tests.api.conftest import Served
from tests.api.fake_cache import NEEDED, UNNEEDED


async def test_a_model_is_pinned_and_unpinned_and_its_row_says_so(api: Served) -> None:
    status, row = await api.call("POST", "/v1/models/pin", json={"ref": UNNEEDED})
    assert (status, row["pinned"]) == (200, True)
    CachedModel.model_validate_json(json.dumps(row), strict=True)
    status, rows = await api.call("GET", "/v1/models")
    assert status == 200 and [row["ref"] for row in rows if row["pinned"]] == [UNNEEDED]
    assert (await api.call("POST", "/v1/models/unpin", json={"ref": UNNEEDED}))[1]["pinned"] is False
    status, error = await api.call("POST", "/v1/models/pin", json={"ref": "hf:org/none:Q8_0"})
    assert (status, error["code"]) == (404, "MODEL_NOT_CACHED")


async def test_gc_deletes_only_where_no_dry_run_was_asked_for(api: Served) -> None:
    status, planned = await api.call("POST", "/v1/models/gc?dry_run=true", json={"older_than_ms": 86_400_000})
    assert status == 200 and api.node.asked == [("plan", 86_400.0)]
    GcAnswer.model_validate_json(json.dumps(planned), strict=True)
    assert [row["action"] for row in planned["rows"]] == ["delete", "delete", "keep"] and planned["rows"][2]["name"] == NEEDED
    assert (await api.call("POST", "/v1/models/gc", json={}))[0] == 200 and api.node.asked[-1] == ("gc", None)


@pytest.mark.parametrize(
    "body",
    [{"older_than_ms": -1}, {"older_than_ms": "7d"}, {"older_than_ms": 10**15}, {"older_than_days": 7}, {"older_than_ms": 1.5}],
)
async def test_what_is_no_age_deletes_nothing(api: Served, body: dict[str, Any]) -> None:
    status, error = await api.call("POST", "/v1/models/gc", json=body)
    assert (status, error["code"]) == (400, "INVALID_PARAMS") and api.node.asked == []
    assert (await api.call("POST", "/v1/models/gc?dry_run=perhaps", json={}))[0] == 400 and api.node.asked == []
