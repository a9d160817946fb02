"""The cache of fetched models: what is believed of it, what is shown, what goes."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.entries import CachedFile, Entry
from tests.models.fetching import fetching
from tests.models.hub_app import COMMIT, Hub

BODY = b"GGUF\x03\x00\x00\x00 of a model"


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files={"a-Q8_0.gguf": BODY, "b-Q4_0.gguf": BODY + b"b"}).start()
    yield made
    await made.close()


async def test_a_row_tells_what_it_is_and_whether_it_still_is(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        shelf = f.shelf
        assert await shelf.cached() == []
        assert await shelf.look("hf:org/repo:Q8_0") == {
            "ref": "hf:org/repo:Q8_0", "present": False, "files": ["a-Q8_0.gguf"], "size_bytes": len(BODY),
        }  # fmt: skip
        model = await f.models.ensure_present("hf:org/repo:Q8_0")
        (row,) = await shelf.cached()
        assert (row["path"], row["verified"], row["source"], row["untouched"]) == (model.local_path, True, COMMIT, True)
        assert (await shelf.look("hf:org/repo:Q8_0"))["present"]
        assert (await shelf.rehash("hf:org/repo:Q8_0", lambda *_: None))["ok"]
        Path(model.local_path).chmod(0o644)
        Path(model.local_path).write_bytes(BODY[::-1])
        assert (await shelf.rehash("hf:org/repo:Q8_0", lambda *_: None))["wrong"] == [f"hf/org/repo/{COMMIT}/a-Q8_0.gguf"]
        assert not (await shelf.cached())[0]["untouched"]
        with pytest.raises(SpecError, match="not in the cache"):
            await shelf.rehash("hf:org/repo:Q4_0", lambda *_: None)
        with pytest.raises(SpecError, match="kept in the cache, no others"):
            shelf.check_ref("file:a.gguf")


async def test_what_is_removed_is_what_no_other_name_has(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        shelf = f.shelf
        path = Path((await f.models.ensure_present("hf:org/repo:Q8_0")).local_path)
        await f.models.ensure_present("hf:org/repo/a-Q8_0.gguf")
        assert await shelf.remove("hf:org/repo:Q8_0") == 0 and path.exists()
        assert await shelf.remove("hf:org/repo/a-Q8_0.gguf") == len(BODY) and not path.exists()
        assert sorted(entry.name for entry in f.cache.root.iterdir()) == ["catalog", "partial", "refs"]
        assert await shelf.remove("hf:org/repo/a-Q8_0.gguf") is None


def entry(size: int = 4, mtime_ns: int = 1) -> Entry:
    found = CachedFile("https/h/m.gguf", size, "0" * 64, expected=False, mtime_ns=mtime_ns)
    return Entry("https://h/m.gguf", "", 0, (found,))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"ref": "https://h/m.gguf", "source": "", "fetched_at_ms": 0, "files": []}', '{"files": 1}'],
)  # fmt: skip
def test_a_note_that_is_none_is_no_model(tmp_path: Path, text: str) -> None:
    cache = ModelCache(tmp_path / "cache")
    cache.prepare()
    cache.put(entry())
    (note,) = (tmp_path / "cache/refs").iterdir()
    note.write_text(text)
    assert cache.find("https://h/m.gguf") is None and cache.all() == [] and cache.remove("https://h/m.gguf") == 0


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_a_note_never_leads_out_of_the_cache(tmp_path: Path, path: str) -> None:
    cache = ModelCache(tmp_path / "cache")
    cache.prepare()
    (tmp_path / "outside").write_bytes(b"mine")
    cache.put(entry())
    (note,) = (tmp_path / "cache/refs").iterdir()
    told = json.loads(note.read_text())
    told["files"][0]["path"] = path
    note.write_text(json.dumps(told))
    assert cache.remove("https://h/m.gguf") == 0 and (tmp_path / "outside").exists()


def test_a_link_in_the_cache_is_not_what_was_fetched(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache")
    cache.prepare()
    (tmp_path / "cache/https/h").mkdir(parents=True)
    link = tmp_path / "cache/https/h/m.gguf"
    link.symlink_to("/etc/passwd")
    info = Path("/etc/passwd").stat()
    cache.put(entry(size=info.st_size, mtime_ns=info.st_mtime_ns))
    assert cache.find("https://h/m.gguf") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of others")
def test_a_directory_that_others_could_change_is_refused(tmp_path: Path) -> None:
    for owner, mode in ((12345, 0o755), (0, 0o777)):
        root = tmp_path / f"{owner}"
        root.mkdir()
        root.chmod(mode)
        os.chown(root, owner, owner)
        with pytest.raises(NodeError, match="other users could change") as caught:
            ModelCache(root).prepare()
        assert caught.value.code == "DIRECTORY_NOT_OURS"


def test_a_place_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match="cannot write") as caught:
        ModelCache(tmp_path / "file/cache").prepare()
    assert "models.cache_dir" in str(caught.value.hint)


async def test_the_umask_of_the_daemon_does_not_hide_models_from_engines(hub: Hub, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        async with fetching(tmp_path, hub.url) as f:
            path = Path((await f.models.ensure_present("hf:org/repo:Q8_0")).local_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o444
    assert all(folder.stat().st_mode & 0o777 == 0o755 for folder in path.parents if folder.is_relative_to(tmp_path / "cache"))


async def test_a_part_of_another_commit_of_the_same_file_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    hub.files["a-Q8_0.gguf"] = BODY * 100_000
    hub.script = [hub.cut_after(100_000)] * 6
    async with fetching(tmp_path, hub.url) as f:
        await f.refusal("hf:org/repo:Q8_0")
        (part,) = f.parts()
        have = part.stat().st_size
        note = part.with_suffix(".json")
        note.write_text(note.read_text().replace(COMMIT, "d" * 40))
        hub.asked = []
        assert (await f.models.ensure_present("hf:org/repo:Q8_0")).verified
    assert have and hub.asked[-1].range == f"bytes={have}-"


async def test_without_a_digest_a_part_of_an_earlier_boot_is_not_believed(hub: Hub, tmp_path: Path) -> None:
    hub.files["m.gguf"] = BODY * 100_000
    hub.script = [hub.cut_after(100_000)] * 6
    async with fetching(tmp_path, hub.url) as f:
        await f.refusal(f"{hub.url}/m.gguf")
        note = f.parts()[0].with_suffix(".json")
        told = json.loads(note.read_text())
        note.write_text(json.dumps(told | {"boot": "another"}))
        hub.asked = []
        await f.models.ensure_present(f"{hub.url}/m.gguf")
    assert hub.asked[-1].range is None
