"""Applying over HTTP: what it takes, and who may bring a configuration of their own."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pool_managerd.api.apply_schemas import AppliedConfiguration, ApplyAnswer
from pool_managerd.api.auth import Access, Token
from pool_managerd.errors import PoolError
from tests.api.conftest import Served, close, serve
from tests.api.fake_configuration import FakeConfiguration
from tests.api.fake_node import FakeNode

TOKEN = "t" * 40
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def own(api: Served) -> FakeConfiguration:
    made = FakeConfiguration(api.node)
    api.server.use_configuration(cast("Any", made))
    return made


async def test_without_a_file_there_is_nothing_to_apply(api: Served) -> None:
    status, body = await api.call("POST", "/v1/apply", json={})
    assert (status, body["code"]) == (409, "NO_CONFIGURATION")
    assert await api.call("GET", "/v1/config/history") == (200, [])


async def test_a_plan_an_operation_and_its_end(api: Served, own: FakeConfiguration) -> None:
    status, plan = await api.call("POST", "/v1/apply?dry_run=true", json={"prune": True})
    assert (status, plan["digest"]) == (200, "d1") and own.calls == [("plan", {"text": None, "number": None, "prune": True})]
    ApplyAnswer.model_validate(plan)
    status, begun = await api.call("POST", "/v1/apply", json={"expect": "d1"})
    assert (status, begun["kind"]) == (202, "apply") and own.calls[-1][1]["expect"] == "d1"
    assert own.calls[-1][1]["origin"] == "apply"
    status, ended = await api.call("POST", "/v1/apply?wait=true", json={"number": 2})
    assert (status, ended["outcome"]["kept"], own.calls[-1][1]["origin"]) == (200, [], "rollback")
    own.fails = PoolError("apply failed for 1 of 1 pools", code="APPLY_FAILED", details={"pools": {"demo": {}}})
    status, failed = await api.call("POST", "/v1/apply?wait=true", json={})
    assert (status, failed["code"], failed["details"]["pools"]) == (500, "APPLY_FAILED", {"demo": {}})


async def test_the_history_has_what_is_documented(api: Served, own: FakeConfiguration) -> None:
    _, rows = await api.call("GET", "/v1/config/history")
    assert [row["number"] for row in rows] == [1, 2]
    for row in rows:
        assert set(AppliedConfiguration.model_fields) == set(AppliedConfiguration.model_validate(row).model_dump())


@pytest.mark.parametrize(
    "body",
    [{"text": "a: 1", "number": 1}, {"text": 1}, {"number": 0}, {"prune": "yes"}, {"path": "/etc/passwd"}, {"text": "\ud800"}],
)
async def test_what_cannot_be_meant_is_refused(api: Served, own: FakeConfiguration, body: dict[str, Any]) -> None:
    assert (await api.call("POST", "/v1/apply", json=body))[0] == 400 and own.calls == []


@pytest.mark.parametrize(("uid", "code"), [(1234, 403), (None, 403), (0, 200), (77, 200)])
async def test_only_the_daemons_own_user_brings_a_configuration(
    uid: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names programs to run, and policy: who only has the shared token has the file applied as it is."""
    monkeypatch.setattr("pool_managerd.httpd.guard.uid_of_peer", lambda _: uid)
    access = Access("127.0.0.1", token_digest=Token(TOKEN).digest, owner_uid=77)
    served = await serve(FakeNode(), access)
    try:
        own = FakeConfiguration(served.node)
        served.server.use_configuration(cast("Any", own))
        assert (await served.call("POST", "/v1/apply", json={}))[0] == 401
        for body in ({"text": "profile: dev"}, {"number": 1}):
            for query in ("?dry_run=true", "?wait=true"):
                status, answer = await served.call("POST", f"/v1/apply{query}", json=body, headers=BEARER)
                assert status == code, answer
                assert code == 200 or answer["code"] == "POLICY_DENIED"
        assert code == 200 or own.calls == []
        assert (await served.call("POST", "/v1/apply?wait=true", json={}, headers=BEARER))[0] == 200
    finally:
        await close(served)


async def test_on_an_open_loopback_others_may_not_even_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_managerd.httpd.guard.uid_of_peer", lambda _: 1234)
    local = Token("l" * 40)
    served = await serve(FakeNode(), Access("127.0.0.1", local_digest=local.digest, owner_uid=77))
    try:
        served.server.use_configuration(cast("Any", FakeConfiguration(served.node)))
        assert (await served.call("POST", "/v1/apply?dry_run=true", json={}))[0] == 401
        assert (await served.call("GET", "/v1/config/history"))[0] == 401
        headers = {"Authorization": f"Bearer {local.value}"}
        status, _ = await served.call("POST", "/v1/apply?dry_run=true", json={"text": "profile: dev"}, headers=headers)
        assert status == 200, "the token that only the daemon's user can read is as good as being them"
    finally:
        await close(served)
