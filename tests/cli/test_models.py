"""``models gc``, ``pin`` and ``unpin``: what is shown before it goes, and how."""

from __future__ import annotations

import json

import pytest

from tests.api.fake_cache import NEEDED, UNNEEDED
from tests.cli.test_commands import Invoke, Server


def test_a_dry_run_says_what_would_go_and_why_each_of_the_others_stays(invoke: Invoke, server: Server) -> None:
    code, out, err = invoke("models", "gc", "--dry-run", "--older-than", "7d")
    assert (code, err) == (0, "") and server.node.asked == [("plan", 7 * 86_400.0)]
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["delete", "delete", "keep"]
    assert UNNEEDED in lines[2] and "nobody has needed it for 12 days" in lines[2] and NEEDED in lines[3]
    assert lines[-1] == "6 GiB would be freed; 11 GiB of 10 GiB were used"


def test_what_was_deleted_is_told_as_done(invoke: Invoke, server: Server) -> None:
    code, out, _ = invoke("models", "gc")
    assert code == 0 and server.node.asked == [("gc", None)]
    assert out.splitlines()[2].split()[0] == "deleted" and out.endswith("6 GiB freed; 11 GiB of 10 GiB were used\n")
    assert json.loads(invoke("models", "gc", "-o", "json")[1])["freed_bytes"] == 6 << 30


@pytest.mark.parametrize("age", ["soon", "-1d", "7w", "", "1e99d"])
def test_what_is_no_age_is_not_guessed_at(invoke: Invoke, server: Server, age: str) -> None:
    code, _, err = invoke("models", "gc", "--older-than", age)
    assert code == 2 and "it is no length of time" in err and server.node.asked == []


def test_a_pin_is_shown_beside_the_pools_that_need_a_model(invoke: Invoke, server: Server) -> None:
    assert invoke("models", "pin", UNNEEDED)[1] == f"{UNNEEDED} is pinned: it stays\n"
    lines = invoke("models", "ls")[1].splitlines()
    assert "demo" in lines[1] and "(pinned)" in lines[2]
    assert "it goes when nobody needs it" in invoke("models", "unpin", UNNEEDED)[1]
    code, _, err = invoke("models", "pin", "hf:org/none:Q8_0")
    assert code == 4 and "is not in the cache" in err
