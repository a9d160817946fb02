"""Model files of one's own, brought into the cache."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models import importing
from pool_managerd.models.importing import import_of
from tests.models.fetching import Fetching, fetching
from tests.models.other_tools import sha256
from tests.models.test_gguf_header import write_split


@pytest.fixture
async def f(tmp_path: Path) -> AsyncIterator[Fetching]:
    async with fetching(tmp_path, policy={"allow_network": False, "allow_schemes": ["file", "hf"]}) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "My Model.Q8_0.gguf"
    path.write_bytes(tiny_model.read_bytes())
    return path


def nobody(_done: int, _total: int) -> None:
    """Nobody listens."""


async def refusal(f: Fetching, path: Path | str, name: str | None = None, *digests: str) -> PoolError:
    with pytest.raises(PoolError) as caught:
        await f.shelf.bring(str(path), name, digests, nobody)
    assert not list((f.cache.root / "partial").glob("import-*")), "nothing is left"
    return caught.value


async def test_a_file_is_in_the_cache_under_its_own_name_and_stays_what_it_was(f: Fetching, file: Path) -> None:
    before = file.stat()
    heard = list[tuple[int, int]]()
    row = await f.shelf.bring(str(file), None, (), lambda done, total: heard.append((done, total)))
    assert row["ref"] == "local:My_Model.Q8_0" and row["digest"] == f"sha256:{sha256(file.read_bytes())}"
    assert not row["verified"], "nobody has said what it has to be"
    size = before.st_size
    await asyncio.sleep(0)
    assert heard[-1] == (size, size)
    model = await f.models.ensure_present("local:My_Model.Q8_0")
    there = Path(model.local_path).stat()
    assert Path(model.local_path).read_bytes() == file.read_bytes()
    assert there.st_ino != before.st_ino and stat.S_IMODE(there.st_mode) == 0o444
    assert (file.stat().st_ino, file.stat().st_mtime_ns, file.stat().st_ctime_ns) == (
        before.st_ino, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip
    file.write_bytes(b"changed")
    assert (await f.shelf.rehash("local:My_Model.Q8_0", nobody))["ok"]
    assert await f.shelf.remove("local:My_Model.Q8_0") == size and file.exists()
    assert not (f.cache.root / "imported").exists()


async def test_it_can_be_what_a_pool_calls_it_on_the_hub(f: Fetching, file: Path) -> None:
    digest = f"sha256:{sha256(file.read_bytes())}"
    assert import_of(str(file), None, (digest.upper(),)).digests == (digest,)
    row = await f.shelf.bring(str(file), "hf:org/repo:Q8_0", (digest,), nobody)
    assert row["verified"]
    model = await f.models.ensure_present("hf:org/repo:q8_0")
    assert model.verified and model.digest == digest


async def test_all_parts_of_a_split_model_come_and_keep_names_that_engines_find(
    f: Fetching, tmp_path: Path, tiny_model: Path
) -> None:
    paths = write_split(tmp_path, tiny_model)
    row = await f.shelf.bring(str(paths[0]), "big", (), nobody)
    assert (row["ref"], row["files"]) == ("local:big", 3)
    model = await f.models.ensure_present("local:big")
    assert [Path(path).name for path in model.files] == [path.name for path in paths]
    assert (await f.shelf.bring(str(paths[0]), None, (), nobody))["ref"] == "local:big"
    assert "it is not the first of 3 parts" in (await refusal(f, paths[1])).message
    paths[2].unlink()
    assert paths[2].name in (await refusal(f, paths[0])).message


async def test_the_same_again_is_no_error_and_another_by_that_name_is(f: Fetching, file: Path, tmp_path: Path) -> None:
    first = await f.shelf.bring(str(file), "mine", (), nobody)
    assert await f.shelf.bring(str(file), "mine", (), nobody) == first
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes() + b"\0" * 32)
    problem = await refusal(f, other, "mine")
    assert problem.status == 409 and first["digest"] in problem.message and "models rm local:mine" in str(problem.hint)
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    other.write_bytes(changed)
    assert (await refusal(f, other, "mine")).status == 409
    assert (await f.models.ensure_present("local:mine")).digest == first["digest"]


async def test_a_name_that_another_model_has_is_refused_before_anything_is_copied(
    f: Fetching, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await f.shelf.bring(str(file), "mine", (), nobody)
    monkeypatch.setattr(importing, "_clone", None)
    with file.open("ab") as more:
        more.write(bytes(32))
    assert (await refusal(f, file, "mine")).status == 409


async def test_a_name_that_nothing_was_imported_by_is_refused_when_it_is_pulled_and_when_it_is_run(f: Fetching) -> None:
    for ask in (f.models.fetch, f.models.ensure_present):
        with pytest.raises(SpecError, match="nothing was imported by that name") as caught:
            await ask("local:none")
        assert "models import FILE --as local:none" in str(caught.value.hint)


async def test_what_is_not_what_it_has_to_be_does_not_stay(f: Fetching, file: Path) -> None:
    problem = await refusal(f, file, None, "sha256:" + "0" * 64)
    assert problem.code == "DIGEST_MISMATCH" and sha256(file.read_bytes()) in problem.message
    assert await f.shelf.cached() == []


async def test_what_is_no_model_is_refused_and_nothing_of_it_is_shown(f: Fetching, tmp_path: Path, file: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:hunter2:0:0 and some more of it")
    problem = await refusal(f, secret)
    assert problem.message == f"cannot import {secret}: it is no GGUF model" and "root" not in str(problem.hint)
    (tmp_path / "link.gguf").symlink_to(secret)
    assert "it is no GGUF model" in (await refusal(f, tmp_path / "link.gguf")).message
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "it is no file" in (await refusal(f, tmp_path / "pipe.gguf")).message
    assert "it is a directory" in (await refusal(f, tmp_path)).message
    assert "it is no file" in (await refusal(f, "/dev/zero")).message
    assert "No such file" in (await refusal(f, tmp_path / "gone.gguf")).message
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-4096])
    assert "the download is not complete" in (await refusal(f, tmp_path / "cut.gguf")).message
    assert await f.shelf.cached() == []


@pytest.mark.parametrize("path", ["relative.gguf", "", "/a\nb", "/a\0b", "/" + "a" * 5000])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(SpecError, match="must be absolute"):
        import_of(path, None)


@pytest.mark.parametrize("name", ["../x", "hf:org/repo", "file:/x.gguf", "ollama:x", "a/b", "local:", "local:../x"])
def test_a_name_that_no_pool_could_use_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="cannot"):
        import_of("/x.gguf", name)


@pytest.mark.parametrize("mode", ["ab", "r+b"])
async def test_a_file_that_grows_or_changes_meanwhile_is_refused(
    f: Fetching, file: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def grow(_source: int, _target: int) -> bool:
        with file.open(mode) as more:
            more.write(b"GGUF")
        return False

    monkeypatch.setattr(importing, "_clone", grow)
    assert "is changed while it is read" in (await refusal(f, file)).message


async def test_a_path_that_leads_elsewhere_after_it_was_checked_brings_nothing(
    f: Fetching, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, parts_of = tmp_path / "secret", importing._parts_of
    secret.write_text("root:hunter2:0:0 and some more of it")

    def swapped(path: Path) -> list[Path]:
        parts = parts_of(path)
        path.unlink()
        path.symlink_to(secret)
        return parts

    monkeypatch.setattr(importing, "_parts_of", swapped)
    problem = await refusal(f, file)
    assert problem.message == f"cannot import {file}: it is no GGUF model"


async def test_a_disk_that_can_clone_is_asked_to(f: Fetching, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 1 << 30, 0), 0)
        return True

    monkeypatch.setattr(importing, "_clone", clone)
    monkeypatch.setattr(importing, "_write", None)  # nothing is written then
    row = await f.shelf.bring(str(file), None, (), nobody)
    assert row["digest"] == f"sha256:{sha256(file.read_bytes())}"


async def test_a_disk_that_cannot_give_all_of_it_is_named(f: Fetching, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert (await refusal(f, file)).message == f"cannot import {file}: it cannot be read: Input/output error"


async def test_what_does_not_fit_is_not_begun(tmp_path: Path, file: Path) -> None:
    async with fetching(tmp_path / "full", keep_free=1 << 60) as f:
        problem = await refusal(f, file)
    assert isinstance(problem, NodeError) and problem.status == 507 and "models.keep_free_bytes" in problem.message


async def test_who_cancels_it_finds_nothing_left(f: Fetching, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(_source: int, _target: int) -> bool:
        begun.set()
        return not goes_on.wait(10)

    monkeypatch.setattr(importing, "_clone", slow)
    work = asyncio.create_task(f.shelf.bring(str(file), None, (), nobody))
    await asyncio.to_thread(begun.wait, 10)
    work.cancel()
    await asyncio.sleep(0)  # it has told the thread to stop
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert list((f.cache.root / "partial").iterdir()) == [] and await f.shelf.cached() == []


async def test_what_a_killed_import_has_left_goes_with_the_next_one(f: Fetching, file: Path) -> None:
    f.cache.prepare()
    left, download = f.cache.root / "partial/import-0123456789abcdef.part", f.cache.root / "partial/0123456789abcdef.part"
    for path in (left, download):
        path.write_bytes(b"GGUF")
    held = f.cache.root / "partial/import-fedcba9876543210.part"
    with held.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        await f.shelf.bring(str(file), None, (), nobody)
        assert held.exists() and download.exists() and not left.exists(), "others still work on those"


async def test_the_same_bytes_under_two_names_are_both_there(f: Fetching, file: Path) -> None:
    """The second import took the file from under the first one's note."""
    for name in ("a", "b"):
        await f.shelf.bring(str(file), name, (), nobody)
    assert [(row["ref"], row["untouched"]) for row in await f.shelf.cached()] == [("local:a", True), ("local:b", True)]
    assert (await f.models.ensure_present("local:a")).local_path == (await f.models.ensure_present("local:b")).local_path


@pytest.mark.skipif(os.geteuid() != 0, reason="only a daemon that is root may read what is closed to others")
async def test_root_does_not_open_to_all_what_its_owner_keeps_to_himself(f: Fetching, file: Path, tmp_path: Path) -> None:
    file.chmod(0o600)
    assert "closed to other users" in (await refusal(f, file)).message
    file.chmod(0o644)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    assert "closed to other users" in (await refusal(f, file.rename(home / "a.gguf"))).message
