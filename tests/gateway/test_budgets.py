"""What a key may use in a day: counted, refused when it is spent, remembered, and new at midnight."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from pool_managerd.errors import RequestError
from pool_managerd.gateway.budgets import Budgets, beside
from pool_managerd.gateway.keys import Key, KeyFile
from pool_managerd.gateway.record import Record
from tests.gateway.lab import CHUNK, OPTIONS, lab

KEY = Key("a", "0", 0, daily_tokens=100)
DAY = 86_400


async def test_a_budget_is_spent_remembered_and_new_the_next_day(tmp_path: Path) -> None:
    now = [10 * DAY + 82_800.0]
    budgets = Budgets(tmp_path / "used", now=lambda: now[0])
    budgets.require(KEY)
    budgets.count("a", 99)
    budgets.require(KEY)
    budgets.count("a", 1)
    with pytest.raises(RequestError, match="has used 100 of the 100 tokens") as refused:
        budgets.require(KEY)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_ms) == (429, "BUDGET_SPENT", 3_600_000)
    assert not refused.value.retriable
    budgets.save()
    again = Budgets(tmp_path / "used", now=lambda: now[0])
    assert again.used("a") == 100 and again.used("b") == 0
    now[0] += 3_600
    again.require(KEY)
    assert Budgets(tmp_path / "used", now=lambda: now[0]).used("a") == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"day": 1}', '{"day": 0, "used": 3}'])
async def test_a_file_that_cannot_be_read_is_counted_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "used").write_text(text)
    assert Budgets(tmp_path / "used", now=lambda: 5.0).used("a") == 0


async def test_a_disk_that_takes_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    budgets = Budgets(tmp_path / "gone" / "used")
    budgets.count("a", 5)
    budgets.save()
    assert budgets.used("a") == 5


def test_what_was_broken_off_counts_as_far_as_it_came() -> None:
    record = Record("r", "/v1/chat/completions")
    for _ in range(3):
        record.passes(CHUNK)
    assert record.spent() == 3
    record.passes(b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": 40}}\n\n')
    assert record.spent() == 47


async def test_requests_of_a_key_count_and_are_refused_when_its_day_is_spent(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    poor, rich = keys.add("poor", daily_tokens=3), keys.add("rich")
    body = {"model": "m", "messages": [], "stream": True}
    async with lab(dataclasses.replace(OPTIONS, keys=KeyFile(keys.place))) as one:
        assert "[DONE]" in await one.text(body, headers={"x-api-key": poor})
        async with one.session.post(one.url + "/v1/chat/completions", json=body, headers={"x-api-key": poor}) as answer:
            assert answer.status == 429 and int(answer.headers["Retry-After"]) > 0
            assert (await answer.json())["error"]["code"] == "budget_spent" and answer.headers["x-should-retry"] == "false"
        assert "[DONE]" in await one.text(body, headers={"x-api-key": rich})
        await asyncio.sleep(0)
    assert Budgets(beside(keys.place)).used("poor") >= 3
