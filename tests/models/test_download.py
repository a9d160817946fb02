"""Downloads of one file: what arrives is what was sent, or nothing is said to have arrived; tests/faults has every fault."""

from __future__ import annotations

import asyncio
import hashlib
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from pool_managerd.errors import NodeError
from tests.models.fetching import fetching
from tests.models.hub_app import Hub, first_byte, status
from tests.small_disk import mounted_small

BODY = b"GGUF\x03\x00\x00\x00" + random.Random(1).randbytes(3_000_000)
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files={"m.gguf": BODY}).start()
    yield made
    await made.close()


async def test_a_file_arrives_complete_under_its_name_and_readable_by_engines(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    async with fetching(tmp_path) as f:
        model = await f.models.ensure_present(
            f"{hub.url}/m.gguf", DIGEST, progress=lambda done, total: seen.append((done, total))
        )
        path = Path(model.local_path)
        assert path.read_bytes() == BODY and path.name == "m.gguf"
        assert (model.verified, model.digest, model.size_bytes) == (True, DIGEST, len(BODY))
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in path.parents if f.cache.root in (folder, *folder.parents)} == {
            0o755
        }
        assert seen[-1] == (len(BODY), len(BODY)) and f.parts() == []


async def test_what_is_there_is_not_asked_for_again_even_by_another_daemon_without_a_network(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path) as f:
        first = await f.models.ensure_present(f"{hub.url}/m.gguf")
        asked = len(hub.asked)
        assert (await f.models.ensure_present(f"{hub.url}/m.gguf")) == first
        assert not first.verified and first.digest == DIGEST
    await hub.close()
    async with fetching(tmp_path, policy={"allow_network": False}) as f:
        assert (await f.models.ensure_present(f"{hub.url}/m.gguf")) == first
    assert len(hub.asked) == asked


async def test_a_download_that_is_cut_again_and_again_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.script = [hub.cut_after(1_500_000), hub.cut_after(1_200_000)]
    async with fetching(tmp_path) as f:
        model = await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)
        assert Path(model.local_path).read_bytes() == BODY
    starts = [int((asked.range or "bytes=0-")[6:-1]) for asked in hub.asked]
    assert starts[0] == 0 < starts[1] < starts[2] and [asked.if_range for asked in hub.asked] == [None, '"1"', '"1"']


async def test_waits_double_and_a_server_that_says_when_is_asked_then(hub: Hub, tmp_path: Path) -> None:
    hub.script = [status(503), status(500), status(429, Retry_After="7"), status(408)]
    async with fetching(tmp_path) as f:
        await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)
        first, second, asked, fourth = f.waits.seconds
        assert 0.75 <= first <= 1.25 and 1.5 <= second <= 2.5 and asked == 7 and 6 <= fourth <= 10


async def test_a_server_that_never_recovers_ends_as_an_error_that_may_be_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.script = [hub.cut_after(100_000)] * 20
    async with fetching(tmp_path) as f:
        error = await f.refusal(f"{hub.url}/m.gguf", DIGEST)
        assert isinstance(error, NodeError) and error.retriable and error.code == "FETCH_FAILED"
        assert len(hub.asked) == 6 and f.parts()[0].stat().st_size == 600_000
        hub.script = [status(429, Retry_After="86400")]
        assert "asked again in" in (await f.refusal(f"{hub.url}/m.gguf", DIGEST)).message


async def test_a_file_that_has_changed_meanwhile_is_fetched_from_its_beginning(hub: Hub, tmp_path: Path) -> None:
    other = BODY[:8] + BODY[:7:-1]

    async def changed(request: web.Request) -> web.StreamResponse:
        hub.files["m.gguf"], hub.etag = other, '"2"'
        return await hub.usual(request)

    hub.script = [hub.cut_after(1_500_000), changed]
    async with fetching(tmp_path) as f:
        model = await f.models.ensure_present(f"{hub.url}/m.gguf")
        assert Path(model.local_path).read_bytes() == other


async def test_a_range_of_another_file_is_not_appended(hub: Hub, tmp_path: Path) -> None:
    async def odd(request: web.Request) -> web.StreamResponse:
        hub.etag = '"2"'  # and If-Range is not heeded
        start = first_byte(request)
        headers = {"ETag": '"2"', "Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"}
        return web.Response(status=206, body=b"x" * (len(BODY) - start), headers=headers)

    hub.script = [hub.cut_after(1_500_000), odd]
    async with fetching(tmp_path) as f:
        model = await f.models.ensure_present(f"{hub.url}/m.gguf")
        assert Path(model.local_path).read_bytes() == BODY
    assert hub.asked[-1].range is None


async def test_a_cancelled_download_leaves_what_it_has_and_the_next_one_goes_on(hub: Hub, tmp_path: Path) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()
    hub.script = [hub.held_after(1_500_000, gate, reached)]
    async with fetching(tmp_path) as f:
        task = asyncio.create_task(f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST))
        await reached.wait()
        await asyncio.sleep(0.05)  # until it has come
        task.cancel()
        await asyncio.wait([task])
        gate.set()
        hashed: list[int] = []
        model = await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST, progress=lambda done, _: hashed.append(done))
        assert model.verified and f.parts() == []
    assert int((hub.asked[-1].range or "bytes=0-")[6:-1]) > 0


async def test_two_that_want_one_model_share_its_download_and_one_of_them_may_go(hub: Hub, tmp_path: Path) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()
    hub.script = [hub.held_after(1_500_000, gate, reached)]
    async with fetching(tmp_path) as f:
        one, two = (asyncio.create_task(f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)) for _ in range(2))
        await reached.wait()
        one.cancel()
        await asyncio.wait([one])
        gate.set()
        assert (await two).verified
    assert len(hub.asked) == 1


async def test_two_processes_that_share_a_cache_download_once(hub: Hub, tmp_path: Path) -> None:
    gate, reached = asyncio.Event(), asyncio.Event()
    hub.script = [hub.held_after(1_500_000, gate, reached)]
    async with fetching(tmp_path) as f, fetching(tmp_path) as other:  # their locks are as those of two processes
        one = asyncio.create_task(f.models.ensure_present(f"{hub.url}/m.gguf"))
        await reached.wait()
        told = asyncio.Event()
        two = asyncio.create_task(other.models.ensure_present(f"{hub.url}/m.gguf", progress=lambda *_: told.set()))
        await told.wait()
        gate.set()
        assert (await one).digest == (await two).digest == DIGEST
    assert len(hub.asked) == 1


async def test_a_file_that_was_changed_on_the_disk_is_not_used(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path) as f:
        path = Path((await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)).local_path)
        path.chmod(0o644)
        path.write_bytes(BODY[:-1] + b"?")
        again = await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)
        assert Path(again.local_path).read_bytes() == BODY


async def test_nothing_is_fetched_into_the_space_that_stays_free(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, keep_free=1 << 60) as f:
        error = await f.refusal(f"{hub.url}/m.gguf", DIGEST)
        assert error.status == 507 and "models.keep_free_bytes" in error.message
        assert f.parts() == [] or f.parts()[0].stat().st_size == 0


async def test_a_disk_that_is_full_is_said_and_what_is_there_is_kept(hub: Hub, tmp_path: Path) -> None:
    async def unknown_length(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"ETag": '"1"'})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(BODY)
        return response

    hub.script = [unknown_length]
    with mounted_small(tmp_path / "small", "1m"):
        async with fetching(tmp_path / "small") as f:
            error = await f.refusal(f"{hub.url}/m.gguf", DIGEST)
            assert error.status == 507 and "No space left" in error.message


async def test_what_is_sent_compressed_is_no_file(hub: Hub, tmp_path: Path) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BODY, headers={"Content-Encoding": "gzip"})

    hub.script = [endless]
    async with fetching(tmp_path) as f:
        assert "compressed" in (await f.refusal(f"{hub.url}/m.gguf", DIGEST)).message


async def test_a_page_that_is_no_model_does_not_stay(hub: Hub, tmp_path: Path) -> None:
    async def page(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>log in first</html>")

    hub.script = [page]
    async with fetching(tmp_path) as f:
        assert "an error page saved as a model" in (await f.refusal(f"{hub.url}/m.gguf")).message
        assert (await f.models.ensure_present(f"{hub.url}/m.gguf")).size_bytes == len(BODY)


async def test_the_loop_is_never_held_up(hub: Hub, tmp_path: Path) -> None:
    hub.files["m.gguf"] = big = BODY * 20
    longest, last, over = 0.0, asyncio.get_running_loop().time(), False

    async def watch() -> None:
        nonlocal longest, last
        while not over:
            last = asyncio.get_running_loop().time()
            await asyncio.sleep(0)
            longest = max(longest, asyncio.get_running_loop().time() - last)

    watching = asyncio.create_task(watch())
    async with fetching(tmp_path) as f:
        await f.models.ensure_present(f"{hub.url}/m.gguf", "sha256:" + hashlib.sha256(big).hexdigest())
    over = True
    await watching
    assert longest < 0.5, "hashing and writing are other threads' work (the server is in this loop, too)"
