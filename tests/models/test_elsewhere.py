"""Models that other tools have: used where they lie once they are verified, and otherwise fetched, or refused with the reason."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models import digests, elsewhere
from pool_managerd.models.places import Layout, Place
from pool_managerd.models.refs import parse_ref
from tests.models.fetching import Fetching, fetching
from tests.models.hub_app import Hub
from tests.models.other_tools import COMMIT, flat, folders, hub_cache, ollama, sha256
from tests.models.test_gguf_header import write_split

BODY = b"GGUF\x03\x00\x00\x00 of a model"
OTHER = b"GGUF\x03\x00\x00\x00 of another"
NAME = "m-Q8_0.gguf"
REF = f"hf:org/repo/{NAME}"
OFF = {"allow_network": False}


@pytest.fixture
def hub() -> Hub:
    return Hub(files={NAME: BODY})


@pytest.fixture
async def served(hub: Hub) -> AsyncIterator[Hub]:
    await hub.start()
    yield hub
    await hub.close()


@asynccontextmanager
async def offline(folder: Path, *places: Place, **how: Any) -> AsyncIterator[Fetching]:
    async with fetching(folder, places=places, **{"policy": OFF, **how}) as f:
        yield f


def snapshot(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything below, with what a change would change."""
    found = ((path, path.lstat()) for path in sorted(root.rglob("*")))
    return {str(path): (info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for path, info in found}


class Heard:
    """Progress, kept."""

    def __init__(self, heard: list[tuple[int, int]]) -> None:
        self._heard = heard

    def __call__(self, done: int, total: int) -> None:
        self._heard.append((done, total))


# --- the hub's cache ---


@pytest.mark.parametrize("ref", [REF, "hf:org/repo:Q8_0", f"hf:org/repo@{COMMIT}/{NAME}", "hf:org/repo@main:q8_0"])
async def test_what_the_hubs_cache_has_is_verified_and_used_there_without_the_network(tmp_path: Path, ref: str) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY, "README.md": b"x", "mmproj-Q8_0.gguf": b"GGUF"})
    before = snapshot(place.root)
    async with offline(tmp_path, place) as f:
        heard = list[tuple[int, int]]()
        await f.models.fetch(ref, checking=Heard(heard))
        model = await f.models.ensure_present(ref)
    assert model.local_path == str(place.root / f"models--org--repo/snapshots/{COMMIT}/{NAME}")
    assert (model.digest, model.verified, model.size_bytes) == (f"sha256:{sha256(BODY)}", True, len(BODY))
    assert heard == [(len(BODY), len(BODY))]
    assert snapshot(place.root) == before and not (f.cache.root / "hf").exists()
    assert f.told == [f"The model {model.id} is used where huggingface has it: {model.local_path}"]


async def test_what_was_hashed_is_not_hashed_again_not_even_by_the_next_daemon(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    for hashed in (1, 0, 0):
        async with offline(tmp_path, place) as f:
            heard = list[tuple[int, int]]()
            for _ in range(2):
                await f.models.fetch(REF, checking=Heard(heard))
            await f.models.ensure_present(REF, f"sha256:{sha256(BODY)}", progress=Heard(heard))
            assert len(heard) == hashed and f.models.locate(REF).verified
    blob = place.root / f"models--org--repo/blobs/{sha256(BODY)}"
    blob.write_bytes(BODY[::-1])
    async with offline(tmp_path, place) as f:
        problem = await f.refusal(REF)
    assert problem.code == "POLICY_DENIED" and f"another digest: expected sha256:{sha256(BODY)}" in str(problem.hint)
    assert str(place.root) in str(problem.hint)


async def test_pools_that_start_at_the_same_time_with_the_same_model_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, reads, read = hub_cache(tmp_path / "hub", {NAME: BODY}), list[int](), digests._hash
    heard = threading.Event()

    def counted(fd: int, stop: threading.Event, report: Callable[[int], None]) -> str:
        reads.append(fd)
        assert heard.wait(20), "those who wait hear how far it is"
        return read(fd, stop, report)

    monkeypatch.setattr(digests, "_hash", counted)
    async with offline(tmp_path, place) as f:
        first = asyncio.create_task(f.models.fetch(REF))
        await asyncio.gather(*(f.models.fetch(REF, checking=lambda *_: heard.set()) for _ in range(3)), first)
        assert len(reads) == 1
        assert f.models.locate(REF).verified


async def test_no_more_than_a_few_models_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {f"m{number}.gguf": BODY + bytes([number]) for number in range(6)}
    place, seen, read = hub_cache(tmp_path / "hub", bodies), list[int](), digests._hash
    async with offline(tmp_path, place) as f:

        def counted(fd: int, stop: threading.Event, report: Callable[[int], None]) -> str:
            seen.append(len(f.models.elsewhere._hashing))
            return read(fd, stop, report)

        monkeypatch.setattr(digests, "_hash", counted)
        monkeypatch.setattr(elsewhere, "POLL_S", 0)
        await asyncio.gather(*(f.models.fetch(f"hf:org/repo/{name}") for name in bodies))
    assert len(seen) == 6 and max(seen) <= elsewhere.HASHED_AT_ONCE


async def test_a_note_of_a_digest_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place) as f:
        await f.models.ensure_present(REF)
        (note,) = (f.cache.root / "elsewhere").iterdir()
    assert json.loads(note.read_text())["ref"] == REF
    note.parent.chmod(0o777)
    async with offline(tmp_path, place) as f:
        assert not f.models.locate(REF).verified
    note.parent.chmod(0o700)
    for text in ("", "[]", '{"files": [{}]}', note.read_text().replace(REF, "hf:org/repo/x.gguf"), "{" * 10_000):
        note.write_text(text)
        async with offline(tmp_path, place) as f:
            assert not f.models.locate(REF).verified


async def test_a_place_that_is_none_any_more_is_left_at_once(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place) as f:
        await f.models.ensure_present(REF)
    async with offline(tmp_path) as f:
        assert (await f.refusal(REF)).code == "POLICY_DENIED"


async def test_another_revision_is_another_model(tmp_path: Path) -> None:
    old = "0" * 39 + "1"
    hub_cache(tmp_path / "hub", {NAME: OTHER}, commit=old, ref="v1")
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place) as f:
        for ref, body in ((REF, BODY), (f"hf:org/repo@v1/{NAME}", OTHER), (f"hf:org/repo@{old}/{NAME}", OTHER)):
            assert (await f.models.ensure_present(ref)).digest == f"sha256:{sha256(body)}"
        assert (await f.refusal(f"hf:org/repo@v2/{NAME}")).code == "POLICY_DENIED"


async def test_a_link_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    blob = place.root / f"models--org--repo/blobs/{sha256(BODY)}"
    blob.rename(tmp_path / sha256(BODY))
    blob.symlink_to(tmp_path / sha256(BODY))
    async with offline(tmp_path, place) as f:
        assert not f.models.elsewhere.likely(parse_ref(REF))
        digest = f"sha256:{sha256(BODY)}"
        with pytest.raises(PoolError) as caught:
            await f.models.ensure_present(REF, digest)
    assert "leads out of" in str(caught.value.hint)


async def test_what_is_not_downloaded_to_its_end_is_not_used_whatever_leads_to_it(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    blob, link = place.root / f"models--org--repo/blobs/{sha256(BODY)}", f"snapshots/{COMMIT}/{NAME}"
    blob.rename(blob.with_suffix(".incomplete"))
    (place.root / "models--org--repo" / link).unlink()
    (place.root / "models--org--repo" / link).symlink_to(blob.with_suffix(".incomplete"))
    async with offline(tmp_path, place) as f:
        assert (await f.refusal(REF, f"sha256:{sha256(BODY)}")).code == "POLICY_DENIED"


async def test_a_cache_that_is_made_to_do_harm_is_only_not_used(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    folder = place.root / "models--org--repo"
    link = folder / f"snapshots/{COMMIT}/{NAME}"
    async with offline(tmp_path, place, Place("none", folder / "refs/main", tuple(Layout))) as f:
        for harm in (link.symlink_to, lambda _: os.mkfifo(link), lambda _: link.mkdir(), lambda _: link.symlink_to("/dev/zero")):
            link.rmdir() if link.is_dir() else link.unlink()
            harm(link)
            assert (await f.refusal(REF)).code == "POLICY_DENIED" and await f.shelf.elsewhere() == []
        main = folder / "refs/main"
        for text in ("../../../etc", "", "g" * 40, "f" * 40):
            main.write_text(text)
            assert (await f.refusal(REF)).code == "POLICY_DENIED"
        main.unlink()
        os.mkfifo(main)
        assert (await f.refusal(REF)).code == "POLICY_DENIED"


async def test_a_file_of_the_cache_without_a_digest_needs_one_from_somebody(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    link = place.root / f"models--org--repo/snapshots/{COMMIT}/{NAME}"
    link.unlink()
    link.write_bytes(BODY)  # as where links cannot be made
    async with offline(tmp_path, place) as f:
        assert "keeps no digests" in str((await f.refusal(REF)).hint)
        assert (await f.models.ensure_present(REF, f"sha256:{sha256(BODY)}")).local_path == str(link)


# --- split models ---


async def test_all_parts_of_a_split_model_must_be_there(tmp_path: Path, split: dict[str, bytes]) -> None:
    first = next(iter(split))
    place = hub_cache(tmp_path / "hub", split)
    async with offline(tmp_path, place) as f:
        model = await f.models.ensure_present(f"hf:org/repo/{first}")
    assert [Path(path).name for path in model.files] == list(split) and model.verified
    assert model.digest == ",".join(f"sha256:{sha256(body)}" for body in split.values())
    last = list(split)[-1]
    (place.root / f"models--org--repo/blobs/{sha256(split[last])}").unlink()
    async with offline(tmp_path, place) as f:
        problem = await f.refusal(f"hf:org/repo/{first}")
        rows = await f.shelf.elsewhere()
    assert f"huggingface has only some parts of it: {last} not" in str(problem.hint)
    assert rows == []


@pytest.fixture
def split(tmp_path: Path, tiny_model: Path) -> dict[str, bytes]:
    (tmp_path / "made").mkdir()
    return {path.name: path.read_bytes() for path in write_split(tmp_path / "made", tiny_model)}


# --- folders and flat files, which have no digests ---


@pytest.mark.parametrize("lay_out", [folders, flat])
async def test_a_file_without_a_digest_is_used_when_the_hub_or_the_configuration_says_what_it_is(
    tmp_path: Path, served: Hub, lay_out: Callable[..., Place]
) -> None:
    place = lay_out(tmp_path / "other", {NAME: BODY})
    async with offline(tmp_path / "a", place) as f:
        problem = await f.refusal(REF)
        assert problem.code == "POLICY_DENIED"
        assert f"keeps no digests: give provisioning.model.checksum, or refer to it as file:{place.root}" in str(problem.hint)
        assert (await f.models.ensure_present(REF, f"sha256:{sha256(BODY)}")).verified
        assert f.models.check(REF, [f"sha256:{sha256(BODY)}"]).verified
    async with fetching(tmp_path / "b", served.url, places=[place]) as f:
        model = await f.models.ensure_present("hf:org/repo:Q8_0")
    assert model.verified and Path(model.local_path).is_relative_to(place.root)
    assert [asked.path for asked in served.asked] == ["/api/models/org/repo/revision/main"], "nothing was fetched"


async def test_a_folder_of_the_repository_is_found_in_folders_and_in_flat_names(tmp_path: Path) -> None:
    ref, digest = "hf:org/repo/sub/dir/a.gguf", f"sha256:{sha256(BODY)}"
    for place in (folders(tmp_path / "lm", {"sub/dir/a.gguf": BODY}), flat(tmp_path / "flat", {"sub/dir/a.gguf": BODY})):
        async with offline(tmp_path / place.tool, place) as f:
            assert Path((await f.models.ensure_present(ref, digest)).local_path).is_relative_to(place.root)


async def test_what_is_not_what_the_hub_has_is_fetched_and_said(tmp_path: Path, served: Hub) -> None:
    same_size = BODY[::-1]
    place = folders(tmp_path / "lm", {NAME: same_size})
    async with fetching(tmp_path, served.url, places=[place]) as f:
        model = await f.models.ensure_present(REF)
    assert Path(model.local_path).is_relative_to(f.cache.root) and model.verified
    (told,) = f.told
    assert "is fetched; what is on this machine is not used" in told and "has another digest" in told
    assert (place.root / "org/repo" / NAME).read_bytes() == same_size


async def test_another_size_is_not_even_hashed(tmp_path: Path, served: Hub) -> None:
    place = folders(tmp_path / "lm", {NAME: BODY + b"!"})
    async with fetching(tmp_path, served.url, places=[place]) as f:
        heard = list[int]()
        await f.models.fetch(REF, checking=lambda done, _: heard.append(done))
    assert heard == []


async def test_where_nothing_is_here_the_hub_is_asked_once(tmp_path: Path, served: Hub) -> None:
    places = [folders(tmp_path / "lm", {"x.gguf": BODY}, "other/repo"), Place("huggingface", tmp_path / "none", (Layout.HUB,))]
    async with fetching(tmp_path, served.url, places=places) as f:
        assert Path((await f.models.ensure_present(REF)).local_path).is_relative_to(f.cache.root)
    assert len(served.asked) == 2 and f.told == [], "the list, and the file"


async def test_a_blob_of_another_revision_or_of_ollama_is_used_by_its_content(tmp_path: Path, served: Hub) -> None:
    places = (hub_cache(tmp_path / "hub", {"renamed.gguf": BODY}, commit="1" * 40, ref="old"), ollama(tmp_path / "ollama", BODY))
    for place in places:
        async with fetching(tmp_path / place.tool, served.url, places=[place]) as f:
            planned = await f.shelf.look(REF)
            assert (planned["present"], planned["tool"], planned["size_bytes"]) == (True, place.tool, len(BODY))
            assert Path((await f.models.ensure_present(REF)).local_path).is_relative_to(place.root)
    assert not any("/resolve/" in asked.path for asked in served.asked)


async def test_a_hub_that_cannot_be_asked_does_not_hide_what_is_here(tmp_path: Path, hub: Hub) -> None:
    place = folders(tmp_path / "lm", {NAME: BODY})
    async with fetching(tmp_path, "http://127.0.0.1:1", places=[place], tries=1) as f:
        problem = await f.refusal(REF)
    assert problem.code == "FETCH_FAILED" and "keeps no digests" in str(problem.hint)


# --- what may not be used ---


async def test_a_checksum_that_it_does_not_have_keeps_it_from_being_used(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place) as f:
        await f.models.ensure_present(REF)
        problem = await f.refusal(REF, f"sha256:{sha256(OTHER)}")
    assert "has another digest" in str(problem.hint)


async def test_what_engines_cannot_read_is_not_used_and_the_remedy_is_said(tmp_path: Path, served: Hub) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    closed = "/root is closed to user 61184"
    async with offline(tmp_path / "a", place, obstacle=lambda _: closed) as f:
        problem = await f.refusal(REF)
        with pytest.raises(SpecError):
            f.models.locate(REF)
        (row,) = await f.shelf.elsewhere()
    remedy = f"open it to them, or have a copy: pool-managerd models import {row['path']} --as {REF}"
    assert f"cannot be read by engines: {closed}; {remedy}" in str(problem.hint)
    assert closed in row["problem"]
    async with fetching(tmp_path / "b", served.url, places=[place], obstacle=lambda _: closed) as f:
        assert Path((await f.models.ensure_present(REF)).local_path).is_relative_to(f.cache.root)
    assert len(f.told) == 1 and closed in f.told[0]


async def test_what_becomes_changeable_by_others_is_left(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place) as f:
        await f.models.ensure_present(REF)
        blobs = place.root / "models--org--repo/blobs"
        blobs.chmod(0o777)
        assert "could be changed by every user" in str((await f.refusal(REF)).hint)


async def test_a_file_that_changes_while_it_is_hashed_is_not_used(tmp_path: Path, served: Hub) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    blob = place.root / f"models--org--repo/blobs/{sha256(BODY)}"

    def replaced(_done: int, _total: int) -> None:
        new = blob.with_name("new")
        new.write_bytes(OTHER)
        new.rename(blob)

    async with fetching(tmp_path, served.url, places=[place]) as f:
        await f.models.fetch(REF, checking=replaced)
        assert Path(f.models.locate(REF).local_path).is_relative_to(f.cache.root)
    assert any("was changed while it was hashed" in told for told in f.told)


async def test_a_file_that_vanishes_is_fetched(tmp_path: Path, served: Hub) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with fetching(tmp_path, served.url, places=[place]) as f:
        assert Path((await f.models.ensure_present(REF)).local_path).is_relative_to(place.root)
        (place.root / f"models--org--repo/blobs/{sha256(BODY)}").unlink()
        assert Path((await f.models.ensure_present(REF)).local_path).is_relative_to(f.cache.root)


async def test_what_the_policy_denies_is_not_had_from_elsewhere_either(tmp_path: Path) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with offline(tmp_path, place, policy=OFF | {"allow_schemes": ["file"]}) as f:
        assert "scheme 'hf' is not allowed" in (await f.refusal(REF)).message
        with pytest.raises(SpecError, match="scheme 'hf' is not allowed"):
            await f.shelf.look(REF)
        (row,) = await f.shelf.elsewhere()
    assert (row["ref"], "scheme 'hf' is not allowed" in row["problem"]) == (REF, True)


# --- Ollama ---


async def test_ollamas_models_are_used_where_they_lie(tmp_path: Path) -> None:
    place = ollama(tmp_path / "ollama", BODY, "registry.ollama.ai/library/tiny/latest", ("projector", b"GGUF eyes"))
    async with offline(tmp_path, place, policy=OFF | {"allow_schemes": ["file"]}) as f:
        assert not f.models.locate("ollama:tiny").verified
        model = await f.models.ensure_present("ollama:tiny")
    assert (model.id, model.verified) == ("ollama:tiny:latest", True)
    assert Path(model.local_path).parent == place.root / "blobs"
    assert f.told[0].endswith("; its projector, which reads images, is not used")


async def test_what_ollama_does_not_have_is_never_fetched_and_what_it_has_is_said(tmp_path: Path) -> None:
    place = ollama(tmp_path / "ollama", BODY, "registry.ollama.ai/ann/mine/8b")
    gone = Place("ollama", tmp_path / "gone", (Layout.OLLAMA,))
    async with fetching(tmp_path, places=[place, gone]) as f:
        problem = await f.refusal("ollama:tiny")
        with pytest.raises(NodeError, match="never fetched"):
            f.models.locate("ollama:tiny")
    assert problem.code == "POOL_UNREADY"
    assert f"looked in {place.root} (ollama:ann/mine:8b); {gone.root} (there is no such directory)" in str(problem.hint)
    assert "ollama pull tiny:latest" in str(problem.hint)
    async with fetching(tmp_path) as f:
        assert "models.elsewhere names no place of Ollama's" in str((await f.refusal("ollama:tiny")).hint)


async def test_a_damaged_blob_of_ollama_is_refused_by_name(tmp_path: Path) -> None:
    place = ollama(tmp_path / "ollama", BODY)
    blob = place.root / f"blobs/sha256-{sha256(BODY)}"
    blob.write_bytes(OTHER)
    async with fetching(tmp_path, places=[place]) as f:
        assert f"{blob} has another digest" in str((await f.refusal("ollama:tiny")).hint)


async def test_another_users_home_is_said_to_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [ollama(tmp_path / "ollama", BODY), hub_cache(tmp_path / "hub", {NAME: BODY})]
    scandir = os.scandir

    def closed(path: Any = ".") -> Any:
        """As it is for anybody but root."""
        if Path(path) in [place.root for place in places]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    async with offline(tmp_path, *places) as f:
        for ref, place in (("ollama:other", places[0]), ("hf:org/other:Q4_0", places[1])):
            told = str((await f.refusal(ref)).hint)
            assert f"{place.root} cannot be read: Permission denied for uid {os.geteuid()}, which the daemon runs as" in told


# --- told to people ---


async def test_a_plan_says_that_nothing_has_to_be_fetched(tmp_path: Path, served: Hub) -> None:
    place = hub_cache(tmp_path / "hub", {NAME: BODY})
    async with fetching(tmp_path, served.url, places=[place]) as f:
        planned = await f.shelf.look(REF)
        assert await f.shelf.used(REF) is None
        await f.models.fetch(REF)
        row = await f.shelf.used(REF)
    path = str(place.root / f"models--org--repo/snapshots/{COMMIT}/{NAME}")
    assert planned == {"ref": REF, "present": True, "files": [path], "size_bytes": len(BODY), "tool": "huggingface"}
    assert row is not None and (row["path"], row["verified"], row["tool"]) == (path, True, "huggingface")
    assert served.asked == []


def rows_by_ref(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["ref"]: row for row in rows}


async def test_a_row_for_each_model_names_it_as_a_pool_would(tmp_path: Path) -> None:
    old = "0" * 40
    hub_cache(tmp_path / "hub", {"old.gguf": OTHER, "not-a-model.gguf": b"<html>"}, commit=old, ref="v1")
    places = [
        hub_cache(tmp_path / "hub", {NAME: BODY, "mmproj.gguf": BODY}), folders(tmp_path / "lm", {"a.gguf": BODY}, "ann/mine"),
        flat(tmp_path / "flat", {"b.gguf": BODY}), ollama(tmp_path / "ollama", BODY),
    ]  # fmt: skip
    async with offline(tmp_path, *places) as f:
        rows = rows_by_ref(await f.shelf.elsewhere())
        for ref in rows:
            assert (await f.models.ensure_present(ref)).local_path == rows[ref]["path"], "each can be put into `model:`"
        assert rows_by_ref(await f.shelf.elsewhere())[REF]["verified"]
    lm, llama = f"file:{tmp_path}/lm/ann/mine/a.gguf", f"file:{tmp_path}/flat/org_repo_b.gguf"
    assert {ref: row["tool"] for ref, row in rows.items()} == {
        REF: "huggingface", f"hf:org/repo@{old}/old.gguf": "huggingface", lm: "lm-studio", llama: "llama.cpp",
        "ollama:tiny:latest": "ollama",
    }  # fmt: skip
    assert all(row["problem"] is None and not row["verified"] for row in rows.values())
    async with fetching(tmp_path / "online", places=places) as f:
        named = {row["ref"] for row in await f.shelf.elsewhere()}
    assert {"hf:ann/mine/a.gguf", "hf:org/repo/b.gguf"} <= named, "where the hub may be asked it can be verified by name"


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    """Whatever the umask is here: what is made is not writable by others."""
    before = os.umask(0o022)
    yield
    os.umask(before)
