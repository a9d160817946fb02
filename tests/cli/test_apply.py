"""``apply``, ``config history`` and ``config rollback``: what they show, ask, and end with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from pool_managerd.errors import PoolError, RequestError, SpecError
from tests.api.fake_configuration import FakeConfiguration, row
from tests.cli.test_commands import Invoke, Server


@pytest.fixture
def own(server: Server) -> FakeConfiguration:
    made = FakeConfiguration(server.node)
    server.served.server.use_configuration(cast("Any", made))
    return made


def asked(own: FakeConfiguration) -> list[str]:
    return [name for name, _ in own.calls]


def test_a_plan_says_what_is_done_to_whom_and_what_it_costs(invoke: Invoke, own: FakeConfiguration) -> None:
    new = {"engine": "llamacpp", "model": "file:n.gguf", "slots": 1, "ctx": 512, "devices": [0], "preload": True}
    own.planned |= {
        "pools": [
            row("gone", "remove", ends_by="drain", drain_deadline_ms=30_000, forecast_duration_ms=210, forecast_spread_ms=20),
            row("starts", "remove", ends_by="stop"), row("down", "remove", forecast_duration_ms=0),
            row("kept", "keep"), row("light", "take_over"),
            row("chat", "reload", strategy="stop_start", forecast_downtime_ms=1004, forecast_spread_ms=62,
                changes=[{"key": "ctx", "old": 512, "new": None}]),
            row("never", "reload", problem="cannot use the flag --nope"),
            row("new", "add", adds=new, warnings=["port 1 is taken by x"]),
        ],
        "at_once": ["health.interval_ms"], "waiting": ["daemon.bind"], "without_effect": ["gpu.x"], "untouched": 44,
        "forecast_duration_ms": None, "replaces_file": True, "edits": "lost",
    }  # fmt: skip
    code, out, _ = invoke("apply", "--dry-run")
    assert code == 2 and asked(own) == ["plan"]
    assert out.splitlines() == [
        "- gone: drain (30 s at most), stop (210 ms, give or take 20 ms) and forget it: because",
        "- starts: stop (how long is not known yet) and forget it: because",
        "- down: forget it: because",
        "= kept: kept: because",
        "~ light: no restart: because",
        "~ chat: reload (stop_start), down for 1004 ms, give or take 62 ms: because",
        "    ctx: 512 -> null",
        "~ never: reload (not as it is now), how long is not known yet: because",
        "    as it is now it would fail, and what runs would go on: cannot use the flag --nope",
        "+ new: add llamacpp file:n.gguf, 1 slot, context 512, devices 0; because",
        "    port 1 is taken by x",
        "at once, no engine is touched: health.interval_ms",
        "needs a restart of the daemon, and changes nothing now: daemon.bind",
        "has no effect in this version: gpu.x",
        "/etc/pm.yaml is replaced; relative paths are those of its folder",
        "the file has changes that were not applied; they are lost",
        "7 pools and 1 setting to change, 44 untouched; how long is not known yet",
    ]


def test_nothing_to_do_is_no_question_and_exit_0(invoke: Invoke, own: FakeConfiguration) -> None:
    own.planned |= {"would_change": False, "pools": []}
    assert invoke("apply", "--dry-run") == (0, "nothing would change\n", "")
    code, out, _ = invoke("apply")
    assert (code, out, asked(own)) == (0, "nothing would change\n", ["plan", "plan", "apply"]), "token and level are taken over"


def test_without_a_terminal_it_does_not_guess(invoke: Invoke, own: FakeConfiguration) -> None:
    code, _, err = invoke("apply")
    assert code == 2 and "no terminal" in err and "--yes" in err and asked(own) == ["plan"]


def test_what_was_shown_is_what_is_done(invoke: Invoke, own: FakeConfiguration, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("profile: dev\n")
    code, out, _ = invoke("apply", "-f", "new.yaml", "--prune", "--yes")
    assert code == 0 and out.endswith("apply: succeeded\ndemo  take over succeeded\n")
    assert own.calls[0] == ("plan", {"text": "profile: dev\n", "number": None, "prune": True})
    assert {key: own.calls[1][1][key] for key in ("text", "prune", "expect")} == {
        "text": "profile: dev\n", "prune": True, "expect": "d1",
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * 1_000_001], ids=["missing", "no text", "too large"])
def test_a_file_that_cannot_be_read_asks_nobody(
    invoke: Invoke, own: FakeConfiguration, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "new.yaml").write_bytes(content)
    code, _, err = invoke("apply", "-f", "new.yaml", "--yes")
    assert code == 2 and "new.yaml" in err and own.calls == []


def test_a_refusal_and_a_failure_have_codes_of_their_own(invoke: Invoke, own: FakeConfiguration) -> None:
    own.fails = PoolError("apply failed for 1 of 1 pools (demo), the others stand", code="APPLY_FAILED")
    code, _, err = invoke("apply", "--yes")
    assert code == 1 and "the others stand" in err
    own.refuses = SpecError("pm.yaml:3:1: unknown key", code="CONFIG_ERROR")
    code, _, err = invoke("apply", "--dry-run")
    assert code == 4 and "pm.yaml:3:1" in err
    own.refuses = RequestError(
        "cannot apply a configuration: another one is being applied", code="OPERATION_IN_PROGRESS", status=409
    )
    assert invoke("apply", "--yes")[0] == 4


def test_the_history_and_the_way_back(invoke: Invoke, own: FakeConfiguration) -> None:
    code, out, _ = invoke("config", "history")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["N", "1", "2"]
    assert "1 (not kept)" in out and "2 (now)" in out and "reload demo" in out
    assert [line.split()[-6:-5] for line in out.splitlines()[1:2]] == [["-"]] and "failed for 1 pool  reload demo" in out
    assert invoke("config", "rollback", "1", "--yes")[0] == 0
    assert own.calls[0] == ("plan", {"text": None, "number": 1, "prune": False}) and own.calls[1][1]["origin"] == "rollback"
    assert json.loads(invoke("config", "history", "-o", "json")[1])[1]["number"] == 2
    assert invoke("config", "rollback", "0")[0] == 2


def test_what_was_reloaded_by_hand_is_told_though_nothing_would_change(invoke: Invoke, own: FakeConfiguration) -> None:
    changes = [{"key": "ctx", "old": 2048, "new": 1024}, {"key": "quant", "old": "Q8_0", "new": None}]
    by_hand = [{"pool_id": "chat", "runs": True, "changes": changes[:1]}, {"pool_id": "code", "runs": False, "changes": changes}]
    own.planned |= {"would_change": False, "pools": [], "by_hand": by_hand}
    code, out, _ = invoke("apply", "--dry-run")
    assert code == 0 and out.splitlines() == [
        "= chat: runs with ctx=2048 by hand, the file says 1024; reload chat --reset goes back",
        "= code: starts with ctx=2048, quant=Q8_0 by hand, the file says 1024, null; reload code --reset goes back",
        "nothing would change",
    ]


@pytest.mark.parametrize(
    ("planned", "last"),
    [
        ({"at_once": ["health.interval_ms"]}, "1 setting to change, 4 pools untouched; at once"),
        ({"at_once": ["auth.token", "policy.x"]}, "2 settings to change, 4 pools untouched; at once"),
        ({"replaces_file": True}, "only the file to change, 4 pools untouched; at once"),
        ({"pools": [row("a", "take_over"), row("b", "keep")]}, "1 pool to change, 4 untouched; at once"),
    ],
)
def test_what_would_change_is_never_nothing(invoke: Invoke, own: FakeConfiguration, planned: dict[str, Any], last: str) -> None:
    own.planned |= {"pools": [], "untouched": 4, **planned}
    code, out, _ = invoke("apply", "--dry-run")
    assert (code, out.splitlines()[-1]) == (2, last)


def test_the_question_names_edits_that_would_be_overwritten(
    invoke: Invoke, own: FakeConfiguration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str] = []
    monkeypatch.setattr("pool_managerd.cli.apply._terminal", lambda: True)

    def no(text: str, **_: bool) -> bool:
        asked_for.append(text)
        return False

    monkeypatch.setattr("typer.confirm", no)
    for edits in ("lost", "kept", None):
        own.planned |= {"edits": edits}
        assert invoke("config", "rollback", "1")[0] == 1
    assert "not applied; they are lost?" in asked_for[0] and "kept in the history" in asked_for[1]
    assert asked_for[2] == "Apply it?" and asked(own) == ["plan"] * 3


def test_a_file_that_is_gone_says_no_address_and_how_to_give_one(
    invoke: Invoke, own: FakeConfiguration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POOL_MANAGERD_URL")
    code, _, err = invoke("config", "rollback", "1", "--yes", "--config", "gone.yaml")
    assert code != 0 and "cannot read it" in err and "--url" in err and own.calls == []
