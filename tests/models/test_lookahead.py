"""What a model needs is known from the beginnings of its files, before they are fetched."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from pool_managerd.errors import PoolError
from pool_managerd.models.ahead_notes import Ahead
from pool_managerd.models.gguf_shape import read_gguf_shape
from pool_managerd.models.shapes import Shapes
from tests.models.fetching import Fetching, fetching
from tests.models.hub_app import Hub, redirect, status
from tests.models.hub_beside import large_file
from tests.models.test_gguf_header import write_split

REF = "hf:org/repo/m.gguf"


@pytest.fixture
async def hub(tiny_model: Path) -> AsyncIterator[Hub]:
    made = await Hub(files={"m.gguf": tiny_model.read_bytes()}).start()
    yield made
    await made.close()


async def foreseen(f: Fetching, ref: str = REF, *, fresh: bool = False) -> Ahead:
    found = await f.models.foresee(ref, fresh=fresh)
    assert found is not None
    return found


def long_header(megabytes: float, total: int = 40 << 30) -> bytes:
    """The header of a model of ``total`` bytes, with a vocabulary of so many megabytes."""
    text = b"x" * 2_000
    count = int(megabytes * 1_000_000) // (len(text) + 8)
    strings = (struct.pack("<Q", len(text)) + text) * count
    key = b"tokenizer.ggml.tokens"
    name = b"blk.0.attn_q.weight"
    rows = (total - int(megabytes * 1_000_000) - (1 << 20)) // 4096 // 2
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 4096, rows, 1, 0)
    return struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, len(key)) + key + struct.pack("<IIQ", 9, 8, count) + strings + tensor


async def test_the_shape_is_that_of_the_file_and_nothing_but_its_beginning_is_read(
    hub: Hub, tmp_path: Path, smol_model: Path
) -> None:
    hub.files["m.gguf"] = smol_model.read_bytes()
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f)
        assert ahead.shape == read_gguf_shape(str(smol_model)) and ahead.size_bytes == smol_model.stat().st_size
        assert hub.served <= 2_000_000 and len(hub.heads) == 1, hub.heads
        model = f.models.expected(REF)
        assert model is not None and model.size_bytes == ahead.size_bytes and not Path(model.local_path).exists()
        assert f.models.shapes.of_gguf(model.local_path) == ahead.shape
        here = await f.models.ensure_present(REF)
        assert here.local_path == model.local_path and await f.models.foresee(REF) is None


async def test_what_was_read_is_kept_over_a_restart_and_not_asked_again(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        first = await foreseen(f)
    asked = len(hub.asked), len(hub.heads)
    async with fetching(tmp_path, hub.url) as f:
        assert await foreseen(f) == first and f.models.expected(REF) is not None
        assert (len(hub.asked), len(hub.heads)) == asked, "nobody was asked"
        assert await foreseen(f, fresh=True) == first
        assert (len(hub.asked), len(hub.heads)) == (asked[0] + 1, asked[1]), "the list of files, and no header"


@pytest.mark.parametrize(("megabytes", "requests", "most"), [(0.5, 1, 2), (7, 2, 8), (15, 2, 16)])
async def test_a_header_of_a_large_file_takes_few_requests_on_one_connection(
    hub: Hub, tmp_path: Path, megabytes: float, requests: int, most: int
) -> None:
    large_file(hub, long_header(megabytes))
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f, f"{hub.url}/m.gguf")
        assert ahead.size_bytes == 40 << 30 and ahead.shape is not None and ahead.shape.weights_bytes > 39 << 30
    assert len(hub.heads) <= requests + 1 <= 4 and hub.served <= most * 1_000_000
    assert len(hub.connections) == 1


async def test_a_redirect_is_followed_once_for_all_pieces(hub: Hub, tmp_path: Path) -> None:
    away = await Hub().start()
    large_file(away, long_header(7))
    hub.files["m.gguf"] = bytes(100)
    hub.head_script = [redirect(f"{away.url}/blob?signature=1")]
    try:
        async with fetching(tmp_path, hub.url) as f:
            assert (await foreseen(f, f"{hub.url}/m.gguf")).shape is not None
        assert len(hub.heads) == 1 and len(hub.heads) + len(away.heads) <= 4
    finally:
        await away.close()


async def test_a_header_that_is_too_long_is_not_known_and_no_reason_to_refuse(hub: Hub, tmp_path: Path) -> None:
    large_file(hub, long_header(17))
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f, f"{hub.url}/m.gguf")
        assert ahead.shape is None and not ahead.problem and f.models.expected(f"{hub.url}/m.gguf") is None
    assert hub.served <= 16_000_000


async def test_a_server_that_knows_no_ranges_does_not_make_us_read_the_file(hub: Hub, tmp_path: Path) -> None:
    total, sent = 1 << 40, 0
    head = long_header(1, total)

    async def whole(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"ETag": '"1"', "Content-Length": str(total)})
        await response.prepare(request)
        await response.write(head)
        sent += len(head)
        while sent < 200_000_000:
            await response.write(bytes(1 << 20))
            sent += 1 << 20
        return response

    hub.head_script = [whole]
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f, f"{hub.url}/m.gguf")
        assert ahead.shape is not None and ahead.size_bytes == total
    assert sent < 60_000_000 and len(hub.heads) == 1


async def test_all_parts_of_a_split_model_count(hub: Hub, tmp_path: Path, tiny_model: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in write_split(tmp_path, tiny_model)}
    first = next(iter(hub.files))
    async with fetching(tmp_path, hub.url) as f:
        for ref in (f"hf:org/repo/{first}", f"{hub.url}/{first}"):
            ahead = await foreseen(f, ref)
            assert ahead.shape == read_gguf_shape(str(tmp_path / first)) and ahead.shape.parts == 3
            assert ahead.size_bytes == sum(map(len, hub.files.values()))
            model = f.models.expected(ref)
            assert model is not None and len(model.files) == 3
        hub.files[first.replace("00003", "00002")] = hub.files[first]
        hub.files[first.replace("-00001-of-00003", "-00002-of-00002")] = hub.files[first]
        assert "has 3 parts" in (await foreseen(f, f"hf:org/repo/{first.replace('00003', '00002')}")).problem


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<html>no such file</html>" * 9, "an error page"), (b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, "more than"),
        (b"GGUF", "begins with"), (b"GGUF\x09\x00\x00\x00" + bytes(40), "format version 9"),
    ],
)  # fmt: skip
async def test_what_no_engine_could_use_is_known_before_it_is_fetched(hub: Hub, tmp_path: Path, content: bytes, why: str) -> None:
    hub.files["m.gguf"] = content
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f)
        assert why in ahead.problem and ahead.shape is None and f.models.expected(REF) is None
        hub.files["m.gguf"] = b"GGUF\x03\x00\x00\x00"
        assert "within its header" in (await foreseen(f)).problem, "what could not be used is looked at again"


async def test_a_file_that_is_cut_short_where_it_lies_is_known(hub: Hub, tmp_path: Path, smol_model: Path) -> None:
    hub.files["m.gguf"] = smol_model.read_bytes()[:4_000_000]
    async with fetching(tmp_path, hub.url) as f:
        assert "its tensors need" in (await foreseen(f)).problem


async def test_what_has_changed_since_is_read_anew(hub: Hub, tmp_path: Path, smol_model: Path) -> None:
    ref = f"{hub.url}/m.gguf"
    async with fetching(tmp_path, hub.url) as f:
        small = await foreseen(f, ref)
        hub.files["m.gguf"], hub.etag = smol_model.read_bytes(), '"2"'
        assert await foreseen(f, ref) == small, "who does not ask does not know"
        changed = await foreseen(f, ref, fresh=True)
        assert changed.size_bytes == smol_model.stat().st_size and changed.files[0].etag == '"2"'
        assert (model := f.models.expected(ref)) is not None and f.models.shapes.of_gguf(model.local_path) == changed.shape
        before = await foreseen(f)
        hub.files["m.gguf"] = smol_model.read_bytes() + b"\0"
        assert (await foreseen(f, fresh=True)).files != before.files


async def test_a_file_that_changes_while_it_is_read_is_read_once_more(hub: Hub, tmp_path: Path) -> None:
    large_file(hub, long_header(7))
    usual = hub.always_head
    assert usual is not None

    async def changed(request: web.Request) -> web.StreamResponse:
        hub.etag = '"2"'
        return await usual(request)

    hub.head_script = [usual, changed]
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f, f"{hub.url}/m.gguf")
        assert ahead.shape is not None and ahead.files[0].etag == '"2"'


async def other_range(request: web.Request) -> web.StreamResponse:
    return web.Response(status=206, body=b"GGUF", headers={"Content-Range": "bytes 7-10/100"})


async def no_range(request: web.Request) -> web.StreamResponse:
    return web.Response(status=206, body=b"GGUF", headers={"Content-Type": "multipart/byteranges"})


async def too_little(request: web.Request) -> web.StreamResponse:
    return web.Response(status=206, body=b"GGUF", headers={"Content-Range": "bytes 0-3/1000000"})


@pytest.mark.parametrize("answer", [other_range, no_range, too_little, status(503), status(416)])
async def test_a_server_that_cannot_do_it_is_no_reason_to_refuse(hub: Hub, tmp_path: Path, answer: object) -> None:
    hub.head_script = [answer] * 2  # type: ignore[list-item]
    async with fetching(tmp_path, hub.url) as f:
        ahead = await foreseen(f)
        assert ahead.shape is None and not ahead.problem and len(hub.heads) == 2
        assert (await foreseen(f)).shape is not None, "it is asked again"


async def test_nobody_is_asked_where_the_policy_does_not_allow_it(hub: Hub, tmp_path: Path) -> None:
    for policy in ({"allow_network": False}, {"allow_schemes": ["file"]}, {"allow_domains": ["example.com"]}):
        async with fetching(tmp_path, hub.url, policy=policy) as f:
            with pytest.raises(PoolError) as caught:
                await f.models.foresee(REF)
            assert caught.value.code == "POLICY_DENIED"
    assert hub.asked == hub.heads == []


async def test_the_token_is_for_the_hub_alone(hub: Hub, tmp_path: Path, tiny_model: Path) -> None:
    away = await Hub(files={"blob": tiny_model.read_bytes()}).start()
    hub.token, hub.head_script = "hf_secret", [redirect(f"{away.url}/blob")]
    try:
        async with fetching(tmp_path, hub.url, token="hf_secret") as f:
            assert (await foreseen(f)).shape is not None
        assert [one.authorization for one in (*hub.heads, *away.heads)] == ["Bearer hf_secret", None]
    finally:
        await away.close()


async def test_who_asks_at_the_same_time_shares_the_answer(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        first, second = await asyncio.gather(foreseen(f), foreseen(f))
        assert first == second and len(hub.heads) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ref": "x"}', "[" * 100_000])
async def test_a_note_that_is_none_is_read_anew(hub: Hub, tmp_path: Path, text: str) -> None:
    async with fetching(tmp_path, hub.url) as f:
        await foreseen(f)
    (note,) = (tmp_path / "cache/headers").iterdir()
    note.write_text(text)
    async with fetching(tmp_path, hub.url) as f:
        assert f.models.expected(REF) is None and (await foreseen(f)).shape is not None


def test_what_is_expected_counts_as_long_as_there_is_no_file(tmp_path: Path, tiny_model: Path, smol_model: Path) -> None:
    shapes, path = Shapes(), tmp_path / "m.gguf"
    expected = read_gguf_shape(str(smol_model))
    shapes.expect(str(path), expected)
    assert shapes.of(path) == expected
    path.write_bytes(tiny_model.read_bytes())
    assert shapes.of(path) == read_gguf_shape(str(tiny_model)) == shapes.of_gguf(str(path))
