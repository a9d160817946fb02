"""Every fetcher through every fault of the network: the right file comes of it, or the named error, and never half a file.

``make test`` runs every fault with one of the fetchers, and the others with what is most telling; ``make faults`` runs all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.download_checks import (
    QUICK_KINDS,
    each_kind,
    holding_nothing_more,
    nothing_but_right,
    nothing_is_told,
    part_bytes,
    watch,
    whole,
)
from tests.faults.download_proxy import (
    Fault,
    another_version,
    ended_after,
    fault_proxy,
    flipped_at,
    held_after,
    range_ignored,
    redirecting,
    refusing,
    reset_after,
    trickling_after,
)
from tests.faults.download_sources import KINDS, SECRET, Source, Tls, source
from tests.models.hub_app import Hub

AT = 150_000
ALWAYS = 99


def anyway(_: Source) -> bool:
    return True


def vouched_for(source: Source) -> bool:
    """Else nobody can tell that a bit is another one."""
    return source.is_vouched_for


@dataclass(frozen=True)
class Row:
    """``faults`` happen to the first requests for the file. ``code`` and ``says``: the error of it; without one it comes whole,
    after so many requests as ``asks`` says (0: that is not told). ``holds_for``: of which fetchers that can be said.
    """

    name: str
    faults: Sequence[Fault | None]
    asks: int = 0
    code: str = ""
    says: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    holds_for: Callable[[Source], bool] = anyway


ROWS = (
    Row("reset", [reset_after(AT)], 2),
    Row("reset before its first byte", [reset_after(0)], 2),
    Row("reset and reset again", [reset_after(AT), reset_after(40_000)], 3),
    Row("reset without end", [reset_after(5_000)] * ALWAYS, 6, "FETCH_FAILED", "the connection was lost"),
    Row("truncated", [ended_after(AT)], 2),
    Row("a bit flipped", [flipped_at(AT)], 2, holds_for=vouched_for),
    Row("a bit flipped, then reset", [flipped_at(AT), reset_after(AT)], 3, holds_for=vouched_for),
    Row("a bit flipped each time", [flipped_at(AT)] * ALWAYS, 2, "DIGEST_MISMATCH", "digest mismatch", holds_for=vouched_for),
    Row("the range ignored", [reset_after(AT), range_ignored], 2),
    Row("another version behind the same name", [reset_after(AT), another_version], 0),
    Row("a stall", [held_after(AT)], 2, how={"stall_s": 0.2}),
    Row("a stall before the answer", [held_after(0)], 2, how={"stall_s": 0.2}),
    Row("a trickle", [trickling_after(AT, 0.05)], 2, how={"window_s": 0.15, "slowest": 10_000_000}),
    Row("503, and a time to wait", [refusing(503, "Retry-After: 3"), refusing(429), refusing(500)], 4),
    Row("a time to wait that is none", [refusing(503, "Retry-After: -1"), refusing(429, "Retry-After: soon")], 3),
    Row("a wait without end", [refusing(503, "Retry-After: " + "9" * 400)], 1, "FETCH_FAILED", "wants to be asked again in"),
    Row("401", [refusing(401)] * ALWAYS, 0, "", "refuses it (401)"),
    Row("404", [refusing(404)], 1, "", "answers 404"),
    Row("416", [reset_after(AT), refusing(416)], 3),
    Row("redirected from https to http", [redirecting("http://127.0.0.1/m")], 1, "POLICY_DENIED", "from https to http"),
    Row("redirected to a private address", [redirecting("https://10.0.0.1/m.gguf")], 1, "POLICY_DENIED", "not a public address"),
    Row("redirected to a file", [redirecting("file:///etc/passwd")], 1, "POLICY_DENIED", "redirects from https to file"),
    Row("redirected to no address", [redirecting("https://[::")], 1, "", "redirects to what is no address"),
    Row("redirected to itself", [redirecting("?")] * ALWAYS, 9, "", "redirected more than 8 times"),
)  # fmt: skip
"""``code`` empty with ``says``: an error with the code of its class."""
QUICK_ROWS = ("reset", "a bit flipped", "a stall", "redirected to a private address")


def cells() -> list[Any]:
    quick = [(kind, row) for kind in KINDS for row in ROWS if kind in QUICK_KINDS or row.name in QUICK_ROWS]
    return [
        pytest.param(kind, row, id=f"{kind}-{row.name}", marks=() if (kind, row) in quick else pytest.mark.slow)
        for kind in KINDS for row in ROWS
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), cells())
async def test_it_comes_whole_or_not_at_all(kind: str, row: Row, tls: Tls, tmp_path: Path) -> None:
    async with source(kind, tls) as s:
        if not row.holds_for(s):
            pytest.skip("nobody has said what it has to be, so that nobody can tell")
        s.proxy.faults = list(row.faults)
        async with holding_nothing_more(), s.fetching(tmp_path, **row.how) as f:
            watch(s, f.cache.root)
            if row.says:
                problem = await f.refusal(s.ref, s.digest)
                assert row.says in problem.message and (not row.code or problem.code == row.code), problem.message
                assert problem.hint or row.code != "POLICY_DENIED"
                nothing_is_told(problem)
                assert f.cache.find(s.ref) is None
                nothing_but_right(s, f.cache.root)
            else:
                await f.models.fetch(s.ref, s.digest)
            assert row.asks in (0, len(s.proxy.asked))
            s.proxy.faults, s.proxy.asked, there = [], [], part_bytes(f.cache.root, s.proxy.hit)
            await whole(s, f)
            assert s.proxy.asked == ([there] if row.says else [])


# --- addresses that are over ---


@pytest.mark.parametrize("kind", each_kind())
async def test_a_signed_address_that_is_over_is_asked_for_anew_and_told_to_nobody(kind: str, tls: Tls, tmp_path: Path) -> None:
    async with source(kind, tls) as s:
        store = await Hub(files={"stored": s.body}).start()
        try:
            async with fault_proxy(store.url, "stored", tls.shown) as away, s.fetching(tmp_path, tries=4) as f:
                watch(s, f.cache.root)
                s.proxy.faults = [redirecting(f"{away.url}/stored?signature={SECRET}")] * ALWAYS
                away.faults = [refusing(403)] * 4
                problem = await f.refusal(s.ref, s.digest)
                assert problem.code == "FETCH_FAILED" and "answers 403" in problem.message
                nothing_is_told(problem)
                away.faults = [refusing(403), reset_after(AT), refusing(401)]
                await whole(s, f)
                assert len(s.proxy.asked) == 4 + 4
        finally:
            await store.close()
