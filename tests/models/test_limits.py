"""Downloads within the limits of the cache, what is told of them, and what a strict policy does not take."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.model_keeping import Limits
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.models.told import Downloaded, Verified
from tests.models.fetching import Fetching, fetching
from tests.models.hub_app import Hub, status

BODY = b"GGUF\x03\x00\x00\x00 of a model" + bytes(1000)


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files={"a-Q8_0.gguf": BODY, "b-Q4_0.gguf": BODY + b"b", "m.gguf": BODY}).start()
    yield made
    await made.close()


@dataclass
class Told:
    """What was told, in order."""

    all: list[Downloaded | Verified] = field(default_factory=list)

    def __call__(self, what: Downloaded | Verified) -> None:
        self.all.append(what)

    def outcomes(self) -> list[tuple[str, str, int]]:
        return [(one.outcome, one.reason, one.received) for one in self.all if isinstance(one, Downloaded)]


def telling(f: Fetching) -> Told:
    told = Told()
    f.fetcher.tell = f.models.tell = told
    return told


async def test_what_would_make_the_cache_too_large_is_refused_before_its_first_byte(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        f.fetcher.room.max_bytes = 2 * len(BODY)
        await f.models.fetch("hf:org/repo:Q8_0")
        hub.asked = []
        refusal = await f.refusal("hf:org/repo:Q4_0")
        assert refusal.status == 507 and "models.max_bytes" in refusal.message and "models rm" in str(refusal.hint)
        assert not [asked for asked in hub.asked if "/resolve/" in asked.path] and f.parts() == []
        f.fetcher.room.max_bytes = 2 * len(BODY) + 1
        await f.models.fetch("hf:org/repo:Q4_0")


async def test_room_is_asked_for_once_and_used_where_it_was_made(hub: Hub, tmp_path: Path) -> None:
    asked: list[Limits] = []
    async with fetching(tmp_path, hub.url) as f:
        await f.models.fetch("hf:org/repo:Q8_0")

        async def make_room(limits: Limits) -> str:
            asked.append(limits)
            if len(asked) == 2:
                f.cache.remove("hf:org/repo:Q8_0")
            return "pool-managerd models gc would free it"

        f.fetcher.make_room = make_room
        f.fetcher.room.max_bytes = len(BODY) + 100
        refusal = await f.refusal("hf:org/repo:Q4_0")
        assert refusal.hint == "pool-managerd models gc would free it"
        assert asked[0].short_bytes == len(BODY) + 1 - 100 and asked[0].need_bytes == len(BODY) + 1
        await f.models.fetch("hf:org/repo:Q4_0")
        assert len(asked) == 2 and [entry.ref for entry in f.cache.all()] == ["hf:org/repo:Q4_0"]


async def test_downloads_at_once_count_what_each_of_the_others_still_needs(hub: Hub, tmp_path: Path) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()
    hub.script = [hub.held_after(100, gate, reached)]
    async with fetching(tmp_path, hub.url) as f:
        f.fetcher.room.max_bytes = 2 * len(BODY)
        first = asyncio.create_task(f.models.fetch("hf:org/repo:Q8_0"))
        await asyncio.wait_for(reached.wait(), 10)
        assert f.fetcher.fetching() == {"hf:org/repo:Q8_0"}
        assert "models.max_bytes" in (await f.refusal("hf:org/repo:Q4_0")).message
        gate.set()
        await first


async def test_every_end_of_a_download_is_told_once_with_what_came(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url, tries=2) as f:
        told = telling(f)
        await f.models.fetch("hf:org/repo:Q8_0")
        await f.models.fetch("hf:org/repo:Q8_0")
        assert told.outcomes() == [("success", "none", len(BODY))], "what is there is not fetched, and not counted"
        hub.digests["b-Q4_0.gguf"] = "0" * 64
        await f.refusal("hf:org/repo:Q4_0")
        assert told.outcomes()[-1] == ("error", "digest_mismatch", 2 * len(BODY) + 2), "it was fetched once more as a whole"
        hub.script = [status(503)] * 2
        await f.refusal(f"{hub.url}/m.gguf")
        assert told.outcomes()[-1] == ("error", "fetch_failed", 0)
        gate, reached = asyncio.Event(), asyncio.Event()
        hub.script = [hub.held_after(100, gate, reached)]
        task = asyncio.create_task(f.models.fetch(f"{hub.url}/m.gguf"))
        await asyncio.wait_for(reached.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        async with asyncio.timeout(10):
            while len(told.outcomes()) < 4:
                await asyncio.sleep(0.01)
        assert told.outcomes()[-1][:2] == ("cancelled", "none") and len(told.outcomes()) == 4


async def test_every_comparison_is_told_with_its_result(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        told, model = telling(f), tmp_path / "own.gguf"
        model.write_bytes(b"GGML" + BODY)
        model.rename(tmp_path / "own.safetensors")
        await f.refusal(f"file:{tmp_path}/own.safetensors", f"sha256:{'0' * 64}")
        shelf = f.shelf
        shelf.tell = told
        path = Path((await f.models.ensure_present("hf:org/repo:Q8_0")).local_path)
        before = f.cache.all()[0].last_verified_ms
        assert (await shelf.rehash("hf:org/repo:Q8_0", lambda *_: None))["ok"]
        after = f.cache.all()[0].last_verified_ms
        assert before and after and after >= before
        path.chmod(0o644)
        path.write_bytes(BODY[::-1])
        assert not (await shelf.rehash("hf:org/repo:Q8_0", lambda *_: None))["ok"]
        assert f.cache.all()[0].last_verified_ms == after, "it was not right then"
        found = [(one.result, one.reason) for one in told.all if isinstance(one, Verified)]
        assert found == [("fail", "start"), ("pass", "verify"), ("fail", "verify")]


async def test_a_file_that_was_found_wrong_is_not_used_again_whatever_it_looks_like(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        path = Path((await f.models.ensure_present("hf:org/repo:Q8_0")).local_path)
        before = path.stat()
        path.chmod(0o644)
        path.write_bytes(BODY[:-1] + b"\x01")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        f.models._digests.know(path.stat(), f.cache.all()[0].digest)  # as where the disk has lost a bit: nothing tells of it
        assert f.cache.find("hf:org/repo:Q8_0") is not None, "nobody could know"
        assert not (await f.shelf.rehash("hf:org/repo:Q8_0", lambda *_: None))["ok"]
        assert f.cache.find("hf:org/repo:Q8_0") is None
        await f.models.ensure_present("hf:org/repo:Q8_0")
        assert path.read_bytes() == BODY


async def test_a_start_is_a_use_and_a_pull_is_none(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        await f.models.fetch("hf:org/repo:Q8_0")
        assert f.cache.all()[0].last_used_ms is None
        f.cache.retire("hf:org/repo:Q8_0", 1e9)
        await f.models.ensure_present("hf:org/repo:Q8_0")
        entry = f.cache.all()[0]
        assert entry.last_used_ms is not None and entry.lifecycle == "active"


async def test_a_model_that_is_deleted_between_the_question_and_its_use_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        fetch, times = f.models.fetch, 0

        async def fetched_and_deleted(*args: Any, **more: Any) -> None:
            nonlocal times
            await fetch(*args, **more)
            times += 1
            if times == 1:
                f.cache.remove("hf:org/repo:Q8_0")

        f.models.fetch = fetched_and_deleted  # type: ignore[method-assign]
        model = await f.models.ensure_present("hf:org/repo:Q8_0")
        assert times == 2 and Path(model.local_path).read_bytes() == BODY


@pytest.mark.parametrize("ref", ["file:{folder}/own.safetensors", "{hub}/m.gguf"])
async def test_a_strict_policy_takes_nothing_that_nobody_has_vouched_for(hub: Hub, tmp_path: Path, ref: str) -> None:
    (tmp_path / "own.safetensors").write_bytes(BODY)
    ref = ref.format(folder=tmp_path, hub=hub.url)
    async with fetching(tmp_path, hub.url, policy={"strict_verification": True}) as f:
        refusal = await f.refusal(ref)
        assert (refusal.code, refusal.status) == ("DIGEST_MISSING", 422) and "provisioning.model.checksum" in str(refusal.hint)
        assert hub.asked == [], "it is not even asked for"
        with pytest.raises(PoolError, match="nobody has said what it has to be"):
            f.models.check(f"file:{tmp_path}/own.safetensors")
        assert (await f.models.ensure_present("hf:org/repo:Q8_0")).verified, "the hub has said what it is"
    async with fetching(tmp_path, hub.url) as f:
        assert not (await f.models.ensure_present(ref)).verified, "else it is used, and that is told"


async def test_what_was_fetched_without_a_digest_is_not_used_either_once_the_policy_is_strict(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        await f.models.ensure_present(f"{hub.url}/m.gguf")
    async with fetching(tmp_path, hub.url, policy={"strict_verification": True}) as f:
        assert (await f.refusal(f"{hub.url}/m.gguf")).code == "DIGEST_MISSING"


async def test_a_cache_that_cannot_be_written_keeps_no_model_from_being_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fetching(tmp_path, hub.url) as f:
        await f.models.fetch("hf:org/repo:Q8_0")

        def full(*_args: object, **_more: object) -> bool:
            raise NodeError("cannot write: No space left on device", status=507)

        monkeypatch.setattr(f.cache, "need", full)
        assert (await f.models.ensure_present("hf:org/repo:Q8_0")).verified
