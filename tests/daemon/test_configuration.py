"""The daemon's own file: what is applied is in it first, or nothing is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from pool_managerd.api.auth import Access
from pool_managerd.config.source import ConfigSource
from pool_managerd.daemon.configuration import Configuration
from pool_managerd.daemon.rereading import Rereading
from pool_managerd.errors import NodeError, RequestError, SpecError
from pool_managerd.node import PoolManager

TEXT = "profile: dev\ndaemon: {{runtime_dir: {0}/run, state_dir: {0}/state}}\nsupervision: {{stop_grace_ms: {1}}}\n"


class Stub:
    """Stands for the server and the log."""

    def __init__(self) -> None:
        self.access = Access("127.0.0.1")
        self.level = ""

    def use_access(self, access: Access) -> None:
        self.access = access

    def use_level(self, level: str) -> None:
        self.level = level


@pytest.fixture
async def own(open_dir: Path) -> AsyncIterator[Configuration]:
    path = open_dir / "pm.yaml"
    path.write_text(TEXT.format(open_dir, 1000))
    source = ConfigSource(path, {})
    config = source.load(source.text())
    async with PoolManager(config) as node:
        stub: Any = Stub()
        made = Configuration(source, {}, node, stub, stub)
        made.started(source.text(), config)
        yield made


def node(own: Configuration) -> PoolManager:
    return own._node


def other(own: Configuration, grace_ms: int, more: str = "") -> str:
    return TEXT.format(own.source.path.parent, grace_ms) + more


async def test_a_text_is_in_the_file_before_it_is_in_force(own: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await own.plan(text=other(own, 7)))["replaces_file"] and node(own).config.supervision.stop_grace_ms == 1000

    in_force = []

    def in_between(text: str, *, gone_too: bool = False) -> None:
        in_force.append(node(own).config.supervision.stop_grace_ms)
        ConfigSource.replace(own.source, text, gone_too=gone_too)

    monkeypatch.setattr(own.source, "replace", in_between)
    await (await own.apply(text=other(own, 7))).wait()
    assert node(own).config.supervision.stop_grace_ms == 7 and own.source.text() == other(own, 7)
    assert [(row["origin"], row["result"]) for row in own.history()] == [("start", None), ("apply", "done")]
    await (await own.apply(number=1, origin="rollback")).wait()
    assert node(own).config.supervision.stop_grace_ms == 1000 and own.source.text() == other(own, 1000)
    assert in_force == [1000, 7], "while the file was written"


async def test_where_the_file_cannot_be_written_nothing_was_applied(own: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: str, **__: bool) -> None:
        raise NodeError("cannot write it", code="CONFIG_UNWRITABLE")

    monkeypatch.setattr(own.source, "replace", refused)
    with pytest.raises(NodeError, match="cannot write it"):
        await own.apply(text=other(own, 7))
    assert node(own).config.supervision.stop_grace_ms == 1000 and len(own.history()) == 1
    assert not [one for one in node(own).operations() if one["kind"] == "apply"]
    own.source.path.write_text(other(own, 8))
    await (await own.apply()).wait()
    assert node(own).config.supervision.stop_grace_ms == 8, "the file itself can be applied all the same"


@pytest.mark.parametrize(
    "text", ["pools: [", "profile: dev\ndaemon: {bind: 0.0.0.0:1}\n", "profile: dev\ntelemetry: {labels: {pool_id: x}}\n"]
)
async def test_what_a_start_would_refuse_changes_nothing(own: Configuration, text: str) -> None:
    with pytest.raises(SpecError):
        await own.plan(text=text)
    with pytest.raises(SpecError):
        await own.apply(text=text)
    assert len(own.history()) == 1 and own.source.text() == other(own, 1000)


async def test_several_problems_of_a_file_that_is_read_again_are_told_apart_in_one_line(own: Configuration) -> None:
    counted: list[object] = []
    node(own).events.listen(lambda event: counted.append(event.fields["outcome"]) if event.type == "apply" else None)
    own.source.path.write_text(other(own, -1, "polls: []\nauth: {tokenn: x}\n"))
    assert await Rereading(own, node(own).events).read("sighup")
    (event,) = node(own).events.recent("config_reread")
    assert counted == ["refused"]
    assert "\n" not in event.human and event.human.count("; ") == 2
    assert "must be ≥" in event.human and "polls" in event.human and "tokenn" in event.human


async def test_a_file_that_is_gone_can_be_told_what_to_be_only_where_it_is(own: Configuration) -> None:
    own.source.path.unlink()
    with pytest.raises(SpecError, match="cannot read it") as gone:
        await own.apply()
    assert "config rollback N" in str(gone.value.hint)
    with pytest.raises(NodeError) as refused:
        await own.apply(text=other(own, 7))
    assert refused.value.code == "CONFIG_UNWRITABLE"


async def test_keys_without_effect_are_named_and_another_plan_than_the_one_shown_is_refused(own: Configuration) -> None:
    pool = "{id: a, engine: llamacpp, model: 'file:m.gguf', preload: false, require_same_engine_version: true}"
    more = f"pools: [{pool}]\n"
    plan = await own.plan(text=other(own, 7, more))
    assert plan["without_effect"] == ["pools[0].require_same_engine_version"] and "supervision.stop_grace_ms" in plan["at_once"]
    with pytest.raises(RequestError) as refused:
        await own.apply(text=other(own, 8, "health: {interval_ms: 9}\n"), expect=plan["digest"])
    assert refused.value.code == "PLAN_CHANGED"
    stub = cast("Any", own._logs)
    await (await own.apply(text=other(own, 7, "telemetry: {log_level: debug}\n"))).wait()
    assert stub.level == "debug"


SECRET = (
    "pools:\n  - {{id: a, engine: llamacpp, model: 'file:m.gguf', preload: false, provisioning: {{env: {{HF_TOKEN: {0}}}}}}}\n"
)


async def test_a_file_that_is_gone_comes_back_with_the_secrets_that_this_daemon_knows(own: Configuration) -> None:
    written = other(own, 7, SECRET.format("first-token-1"))
    await (await own.apply(text=written)).wait()
    await (await own.apply(text=other(own, 8), prune=True)).wait()
    own.source.path.unlink()
    plan = await own.plan(number=2)
    assert plan["replaces_file"] and plan["edits"] is None
    await (await own.apply(number=2, expect=plan["digest"], origin="rollback")).wait()
    assert own.source.text() == written and own.source.path.stat().st_mode & 0o777 == 0o600
    own.source.path.unlink()
    await (await own.apply(number=1, prune=True)).wait()
    own.source.path.unlink()
    node(own).applied._secrets.clear()  # as in a later daemon
    with pytest.raises(SpecError, match="HF_TOKEN of pool a"):
        await own.apply(number=2)
    assert not own.source.path.exists()


async def test_edits_that_were_not_applied_are_named_and_kept_in_the_history(own: Configuration) -> None:
    assert (await own.plan(text=other(own, 7)))["edits"] is None
    edited = other(own, 9, "# not done yet\n" + SECRET.format("s3cr3t-token-9"))
    shown = await own.plan(text=other(own, 7))
    own.source.path.write_text(edited)
    with pytest.raises(RequestError) as refused:
        await own.apply(text=other(own, 7), expect=shown["digest"])
    assert refused.value.code == "PLAN_CHANGED" and own.source.text() == edited, "who agreed has not seen them"
    plan = await own.plan(text=other(own, 7))
    assert plan["edits"] == "kept" and (await own.plan())["edits"] is None, "the file itself overwrites nothing"
    await (await own.apply(text=other(own, 7), expect=plan["digest"])).wait()
    assert [(row["origin"], row["result"]) for row in own.history()] == [
        ("start", None), ("edit", "not applied"), ("apply", "done"),
    ]  # fmt: skip
    assert "s3cr3t" not in str(node(own).applied._known)
    await (await own.apply(number=2)).wait()
    assert own.source.text() == edited


@pytest.mark.parametrize("content", [b"pools: [", b"\xff\xfe"], ids=["invalid", "no text"])
async def test_edits_that_mean_nothing_are_lost_and_that_is_said(own: Configuration, content: bytes) -> None:
    own.source.path.write_bytes(content)
    assert (await own.plan(text=other(own, 7)))["edits"] == "lost"
    plan = await own.plan(number=1)
    assert plan["edits"] == "lost" and plan["replaces_file"] and plan["would_change"]
    await (await own.apply(number=1, expect=plan["digest"])).wait()
    assert own.source.text() == other(own, 1000) and len(own.history()) == 1


async def test_where_the_file_cannot_be_written_its_edits_are_in_no_history(
    own: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: str, **__: bool) -> None:
        raise NodeError("cannot write it", code="CONFIG_UNWRITABLE")

    monkeypatch.setattr(own.source, "replace", refused)
    own.source.path.write_text(other(own, 9))
    with pytest.raises(NodeError, match="cannot write it"):
        await own.apply(text=other(own, 7))
    assert [row["origin"] for row in own.history()] == ["start"]
