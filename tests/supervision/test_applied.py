"""The history of configurations: numbered, bounded, kept for the next daemon, and without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.config.load import load_text
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision import applied
from pool_managerd.supervision.applied import APPLIED, KEPT, Applied
from pool_managerd.testing.fake_parts import FakeRecords

FILE = Path("/etc/pm/pm.yaml")


def text(ctx: int, secret: str = "", comment: str = "") -> str:
    env = f", provisioning: {{env: {{HF_TOKEN: {secret}}}}}" if secret else ""
    return f"{comment}pools:\n  - {{id: a, engine: llamacpp, model: 'file:m.gguf', ctx: {ctx}{env}}}\n"


async def keep(history: Applied, written: str) -> int | None:
    return await history.keep(written, load_text(written, FILE, env={}), FILE, "apply", "reload a")


def back(history: Applied, number: int, present: str) -> str:
    return history.text(number, load_text(present, FILE, env={}), FILE)


@pytest.fixture
def records() -> FakeRecords:
    return FakeRecords()


@pytest.fixture
def history(records: FakeRecords) -> Applied:
    return Applied(records, lambda: 1_795_000_000_000)


async def test_each_has_a_number_and_the_last_one_is_not_kept_twice(history: Applied, records: FakeRecords) -> None:
    assert [await keep(history, text(1)), await keep(history, text(2)), await keep(history, text(2))] == [1, 2, None]
    assert await keep(history, text(1)) == 3, "what comes back is applied anew"
    following = Applied(records, lambda: 0)
    following.restore()
    assert following.rows() == history.rows()
    assert [(row["number"], row["kept"], row["pools"]) for row in following.rows()] == [(1, True, 1), (2, True, 1), (3, True, 1)]
    assert back(following, 2, text(1)) == text(2)


async def test_the_oldest_go_by_number_and_by_size(history: Applied, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(KEPT + 5):
        await keep(history, text(number + 1))
    assert [row["number"] for row in history.rows()] == list(range(6, KEPT + 6))
    monkeypatch.setattr(applied, "MAX_CHARS", 3 * len(text(1)))
    await keep(history, text(99, comment="# " + "x" * 5 * len(text(1)) + "\n"))
    assert [row["number"] for row in history.rows()] == [KEPT + 6], "the last one always stays"
    with pytest.raises(RequestError) as gone:
        back(history, 1, text(1))
    assert (gone.value.code, gone.value.status) == ("CONFIGURATION_NOT_FOUND", 404)


async def test_no_secret_is_kept_and_a_changed_one_does_not_come_back(history: Applied, records: FakeRecords) -> None:
    await keep(history, text(1, "first-token"))
    await keep(history, text(2, "second-token"))
    assert "-token" not in str(records.facts(APPLIED)).replace("withheld", "")
    assert back(history, 1, text(2, "second-token")) == text(1, "second-token")
    assert back(history, 1, text(2)) == text(1, "second-token"), "this daemon has seen it"
    following = Applied(records, lambda: 0)
    following.restore()
    with pytest.raises(SpecError, match="HF_TOKEN of pool a"):
        back(following, 1, text(2))


async def test_a_secret_alone_makes_no_new_one(history: Applied) -> None:
    assert [await keep(history, text(1, "first-token")), await keep(history, text(1, "second-token"))] == [1, None]


async def test_what_cannot_be_kept_without_its_secret_is_listed_and_no_more(history: Applied) -> None:
    await keep(history, text(1, '"first\\x2dtoken"'))
    assert [row["kept"] for row in history.rows()] == [False]
    with pytest.raises(SpecError, match="its text is not kept"):
        back(history, 1, text(1))


async def test_what_was_not_applied_after_all_is_forgotten(history: Applied, records: FakeRecords) -> None:
    history.forget(await keep(history, text(1)))
    assert history.rows() == [] and records.facts(APPLIED) == {}
    history.forget(None)


async def test_how_it_ended_is_kept_with_it(history: Applied, records: FakeRecords) -> None:
    history.note(text(1), load_text(text(1), FILE, env={}), FILE, "start", "1 pool at the start")
    for number, failed in ((2, 0), (3, 2)):
        await keep(history, text(number))
        history.ended(failed)
    await keep(history, text(4))
    following = Applied(records, lambda: 0)
    following.restore()
    told = [(row["result"], row["failed"]) for row in following.rows()]
    assert told == [(None, None), ("done", 0), ("failed", 2), ("not finished", None)], "its daemon ended before"
    assert await keep(following, text(4)) is None
    following.begun()
    following.ended(0)
    assert following.rows()[-1]["result"] == "done", "the same was applied again"
