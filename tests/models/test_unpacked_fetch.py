"""Models in archives and images: fetched, unpacked, kept as what they are, whatever happens on the way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from pool_managerd.config import PolicyConfig
from pool_managerd.core.model_keeping import Limits
from pool_managerd.models import folder_fetch, unpacked_fetch
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.leftovers import bytes_on_disk
from pool_managerd.models.progress import Progress
from pool_managerd.models.refs import parse_ref
from pool_managerd.models.remote import RemoteFile, RemoteModel
from pool_managerd.models.unpacked_fetch import Unpacked, UnpackedFetch
from pool_managerd.models.unpacking import Unpacking
from tests.models.archives import Contents, device, folder, link, tar_of
from tests.models.fetching import Fetching, fetching
from tests.models.kills import killed_at_each
from tests.models.registry_app import Registry
from tests.models.test_repository import CONFIG, shard
from tests.system.nodes import until

OCI = {"allow_schemes": ["oci", "http"]}
GGUF = b"GGUF\x03\x00\x00\x00 and more"
PACK = "application/vnd.cncf.model."
DOCKER = "application/vnd.docker.ai."
MODEL = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": shard("a1")}
"""What an engine needs; README.md and the like it does not."""
BESIDE = {name: MODEL[name] for name in ("config.json", "tokenizer.json")}


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made = await Registry().start()
    yield made
    await made.close()


def ref(registry: Registry, tag: str = "1") -> str:
    return f"oci://{registry.host}/ai/tiny:{tag}"


def below(path: str, files: Any) -> Any:
    return {f"{path}/{name}": content for name, content in files.items()}


def all_files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def pulled(f: Fetching, registry: Registry, tag: str = "1") -> dict[str, bytes]:
    """What is in the folder that an engine would be given."""
    found = await f.models.ensure_present(ref(registry, tag))
    assert found.verified
    root = Path(found.local_path)
    assert root.is_dir() and len(found.weights) == 1
    return {name: (root / name).read_bytes() for name in all_files(root)}


async def refusal(registry: Registry, tmp_path: Path, tag: str = "1", **policy: Any) -> str:
    async with fetching(tmp_path, policy=OCI | policy) as f:
        problem = await f.refusal(ref(registry, tag))
        assert f.cache.all() == [] and not (f.cache.root / "oci").exists()
        return f"{problem.code} {problem.message} {problem.hint}"


# --- how tools package ---


@pytest.mark.parametrize("packed", [True, False])
async def test_a_model_in_an_image_is_what_is_in_its_models(registry: Registry, tmp_path: Path, *, packed: bool) -> None:
    base = tar_of({"bin/sh": b"#", "models": folder, "models/old.gguf": GGUF, "models/tokenizer.json": b"old"}, packed=packed)
    layer = tar_of(below("models", MODEL | {".wh.old.gguf": b"", "README.md": b"#"}), packed=packed)
    digest = registry.put_image("1", base, layer, kind=f"application/vnd.oci.image.layer.v1.tar{'+gzip' if packed else ''}")
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL
        (entry,) = f.cache.all()
        assert entry.source == digest and entry.verified and len(entry.parts) == 1
        assert [path for path in all_files(f.cache.root) if path.startswith("partial")] == [], "no layer stays"
        modes = {path.stat().st_mode & 0o7777 for path in (f.cache.root / entry.folder).rglob("*")}
        assert modes == {0o444} and (f.cache.root / entry.folder).stat().st_mode & 0o7777 == 0o755


async def test_a_gguf_model_in_an_image_is_the_file(registry: Registry, tmp_path: Path) -> None:
    parts = {f"m-0000{n}-of-00002.gguf": GGUF + bytes([n]) for n in (1, 2)}
    registry.put_image("1", tar_of(below("models/q4", parts | {"mmproj-m.gguf": GGUF, "config.json": b"{}"}), packed=True))
    async with fetching(tmp_path, policy=OCI) as f:
        entry = await f.fetcher.fetch(parse_ref(ref(registry)), (), lambda _d, _t: None)
        assert entry.folder == "" and [(f.cache.root / one.path).read_bytes() for one in entry.files] == list(parts.values())
        assert entry.path.endswith("-all/m-00001-of-00002.gguf") and entry.digest.count("sha256:") == 2


async def test_docker_packages_of_weights_and_an_archive_of_what_is_beside_them(registry: Registry, tmp_path: Path) -> None:
    beside = tar_of(BESIDE)
    pooling = tar_of({"1_Pooling": folder, "1_Pooling/config.json": b"{}"})
    registry.put(
        "1", (MODEL["model.safetensors"], f"{DOCKER}safetensors", None), (beside, f"{DOCKER}vllm.config.tar", None),
        (pooling, f"{DOCKER}dir.tar", None), (b"MIT", f"{DOCKER}license", None),
        (b"{{ x }}", f"{DOCKER}chat.template.jinja", None),
    )  # fmt: skip
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL | {"1_Pooling/config.json": b"{}", "chat_template.jinja": b"{{ x }}"}
        assert not any(path.endswith(hashlib.sha256(b"MIT").hexdigest()) for path, _ in registry.asked)
        origins = [json.loads(line) for line in (f.cache.books / "provenance.jsonl").read_text().splitlines()]
        assert sorted(one["path"].partition("-all/")[2] for one in origins) == all_files(f.cache.root / f.cache.all()[0].folder)


async def test_two_layers_of_weights_without_names_are_two_parts(registry: Registry, tmp_path: Path) -> None:
    beside = (tar_of(BESIDE, packed=True), f"{DOCKER}vllm.config.tar", None)  # whatever its kind says, it is what it begins with
    registry.put("1", *((shard(name), f"{DOCKER}safetensors", None) for name in ("a1", "b2")), beside)
    async with fetching(tmp_path, policy=OCI) as f:
        found = await f.models.ensure_present(ref(registry))
        assert [Path(path).read_bytes() for path in found.weights] == [shard("a1"), shard("b2")]
        assert [Path(path).name for path in found.weights] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.mark.parametrize("way", ["", "/home/me/tiny/", "../../tiny/"])
async def test_a_layer_for_each_file_is_a_folder_of_what_an_engine_needs(registry: Registry, tmp_path: Path, way: str) -> None:
    kinds = {"model.safetensors": "weight.v1.raw", "README.md": "doc.v1.raw", "run.py": "code.v1.raw"}
    files = MODEL | {"README.md": b"#", "run.py": b"import os", "1_Pooling/config.json": b"{}"}
    layers = [(body, PACK + kinds.get(name, "weight.config.v1.raw"), way + name) for name, body in files.items()]
    registry.put("1", *layers)
    async with fetching(tmp_path, policy=OCI) as f:
        plan = await f.shelf.look(ref(registry))
        assert plan["size_bytes"] == sum(map(len, MODEL.values())) + 2 and plan["files"][0] == "model.safetensors"
        assert await pulled(f, registry) == MODEL | {"1_Pooling/config.json": b"{}"}


async def test_archives_for_each_kind_of_file_and_one_in_a_folder(registry: Registry, tmp_path: Path) -> None:
    weights = tar_of({"tiny/model.safetensors": MODEL["model.safetensors"]}, packed=True)
    beside = tar_of({"./tiny/config.json": MODEL["config.json"], "/tiny/tokenizer.json": b"{}"})
    registry.put(
        "1", (weights, f"{PACK}weight.v1.tar+gzip", "model.safetensors"), (beside, f"{PACK}weight.config.v1.tar", None),
        (b"no archive at all", f"{PACK}dataset.v1.tar", None), (b"nor is this", f"{PACK}code.v1.tar", None),
    )  # fmt: skip
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL


async def test_what_oras_pushes_are_files_though_it_calls_them_layers_of_an_image(registry: Registry, tmp_path: Path) -> None:
    registry.put("1", *((body, "application/vnd.oci.image.layer.v1.tar", name) for name, body in MODEL.items()))
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL


async def test_links_within_an_image_are_the_files_they_lead_to(registry: Registry, tmp_path: Path) -> None:
    hub: Contents = {
        "models/blobs/1": MODEL["config.json"], "models/blobs/2": MODEL["model.safetensors"],
        "models/m/config.json": link("../blobs/1"), "models/m/model.safetensors": link("models/blobs/2", hard=True),
        "models/m/tokenizer.json": link("/models/m/loop"), "models/m/loop": link("tokenizer.json"),
        "models/m/vocab.json": link("../../../etc/passwd"), "models/m/merges.txt": device,
    }  # fmt: skip
    registry.put_image("1", tar_of(hub, packed=True))
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == {name: MODEL[name] for name in ("config.json", "model.safetensors")}


# --- the cache ---


async def test_the_catalog_knows_the_files_and_not_the_archive(registry: Registry, tmp_path: Path) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    registry.manifests["2"] = registry.manifests["1"]
    async with fetching(tmp_path, policy=OCI) as f:
        await pulled(f, registry)
        asked = len(registry.asked)
        await pulled(f, registry, "2")
        assert not any("/blobs/" in path for path, _ in registry.asked[asked:]), "another name of it is the same files"
        (row, _) = await f.shelf.cached()
        assert row["size_bytes"] == sum(map(len, MODEL.values())) == bytes_on_disk(f.cache) and row["files"] == 3
        assert (await f.shelf.rehash(ref(registry), lambda _d, _t: None))["ok"]
        origins = [json.loads(line) for line in (f.cache.books / "provenance.jsonl").read_text().splitlines()]
        assert sorted(Path(one["path"]).name for one in origins) == sorted(MODEL)
        assert await f.shelf.remove(ref(registry)) == 0 and await f.shelf.remove(ref(registry, "2")) == row["size_bytes"]
        assert not (f.cache.root / "oci").exists()


async def test_a_file_that_was_harmed_is_fetched_and_unpacked_anew(registry: Registry, tmp_path: Path) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    async with fetching(tmp_path, policy=OCI) as f:
        path = Path((await f.models.ensure_present(ref(registry))).local_path) / "config.json"
        path.chmod(0o644)
        path.write_bytes(b"{}")
        assert await pulled(f, registry) == MODEL


async def test_its_checksums_are_those_of_the_files_in_it(registry: Registry, tmp_path: Path) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    right = f"sha256:{hashlib.sha256(MODEL['model.safetensors']).hexdigest()}"
    async with fetching(tmp_path, policy=OCI) as f:
        wrong = await f.refusal(ref(registry), f"sha256:{'0' * 64}")
        assert wrong.code == "DIGEST_MISMATCH" and f.cache.all() == []
        asked = len(registry.asked)
        assert (await f.models.ensure_present(ref(registry), right)).digest == right
        assert not any("/blobs/" in path for path, _ in registry.asked[asked:]), "what was fetched is used"


# --- what happens on the way ---


async def test_who_waits_hears_what_is_done_and_the_loop_goes_on(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    writing, told = _Held(monkeypatch), list[tuple[str, int, int]]()
    async with fetching(tmp_path, policy=OCI) as f:
        work = asyncio.create_task(
            f.models.fetch(ref(registry), progress=_telling(told, "fetch"), unpacking=_telling(told, "unpack"))
        )
        await writing.reached()
        late = asyncio.create_task(f.models.fetch(ref(registry), unpacking=_telling(told, "late")))
        await until(lambda: any(said == "late" for said, *_ in told), "the second to hear")
        writing.gate.set()
        await asyncio.gather(work, late)
    total = sum(map(len, MODEL.values()))
    assert told[0][0] == "fetch" and ("unpack", total, total) in told and ("late", total, total) in told


async def test_what_is_cancelled_ends_and_goes_on_with_the_layers_that_are_here(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    with monkeypatch.context() as patch:
        writing = _Held(patch, until=lambda work: work._stop)
        async with fetching(tmp_path, policy=OCI) as f:
            work = asyncio.create_task(f.models.fetch(ref(registry)))
            await writing.reached()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            await until(lambda: not f.fetcher._tasks, "the download to end")
            assert writing.went_on, "it was told to stop"
            assert f.cache.all() == [] and [Path(path).parent.name for path in all_files(f.cache.root / "partial")] == ["layers"]
    registry.blobs = {}
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL


async def test_of_two_names_at_the_same_time_one_unpacks(registry: Registry, tmp_path: Path) -> None:
    registry.put_image("1", tar_of(below("models", MODEL), packed=True))
    registry.manifests["2"] = registry.manifests["1"]
    async with fetching(tmp_path, policy=OCI) as f:
        one, two = await asyncio.gather(pulled(f, registry), pulled(f, registry, "2"))
        assert one == two == MODEL and len(f.cache.all()) == 2
        assert sum("/blobs/" in path for path, _ in registry.asked) == 1


async def test_room_is_for_the_archive_and_for_what_it_unpacks_to(registry: Registry, tmp_path: Path) -> None:
    image = tar_of(below("models", MODEL | {"model.safetensors": bytes(8 << 20)}), packed=True)
    registry.put_image("image", image)
    registry.put("pack", (tar_of(MODEL), f"{PACK}weight.v1.tar", None))
    asked_for = list[int]()

    async def make_room(limits: Limits) -> str:
        asked_for.append(limits.need_bytes)
        return "nothing"

    async with fetching(tmp_path, policy=OCI) as f:
        f.fetcher.room.max_bytes, f.fetcher.make_room = 4 << 20, make_room
        assert (await f.refusal(ref(registry, "image"))).status == 507
        assert asked_for == [(8 << 20) + sum(map(len, BESIDE.values()))], "it is known by then, and asked for"
        assert [path.stat().st_size for path in f.cache.root.rglob("*.tar")] == [len(image)], (
            "its archive is kept for the next try"
        )
        f.fetcher.room.max_bytes = bytes_on_disk(f.cache) + 2 * len(tar_of(MODEL)) - 1
        asked = len(registry.asked)
        assert (await f.refusal(ref(registry, "pack"))).status == 507
        assert not any("/blobs/" in path for path, _ in registry.asked[asked:]), "it is known before"
        f.fetcher.room.max_bytes = None
        assert len(await pulled(f, registry, "image")) == 3


def test_who_is_killed_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar_of({"models/m.gguf": GGUF})
    for module in (unpacked_fetch, folder_fetch):  # a process that is killed leaves no lock
        monkeypatch.setattr(module, "locked", lambda *_: nullcontext())
    number = 0
    for number in killed_at_each(monkeypatch, lambda n: lambda: _unpacked(tmp_path / str(n), archive)):
        cache = ModelCache(tmp_path / str(number) / "cache")
        entry = cache.find("oci://r/m:1")
        if entry is not None:
            assert [(cache.root / one.path).read_bytes() for one in entry.files] == [GGUF]
        _unpacked(tmp_path / str(number), archive)
        assert cache.find("oci://r/m:1") is not None and not list(cache.root.rglob("*.tar"))
        shutil.rmtree(tmp_path / str(number))
    assert number > 30


def _unpacked(folder: Path, archive: bytes) -> None:
    """In a cache of its own, without a network."""
    cache = ModelCache(folder / "cache")
    cache.prepare()
    sha256 = hashlib.sha256(archive).hexdigest()
    layer = RemoteFile(URL("http://r/v2/m/blobs/x"), f"{sha256}.tar", len(archive), sha256, is_packed=True)
    remote = RemoteModel(parse_ref("oci://r/m:1"), "oci/r/x-all", (layer,), "x", inside="models")

    async def fetch(place: Path, file: RemoteFile, _told: Progress) -> CachedFile:
        if not place.exists():
            place.with_suffix(".new").write_bytes(archive)
            place.with_suffix(".new").rename(place)
        info = place.stat()
        return CachedFile(str(place.relative_to(cache.root)), info.st_size, sha256, expected=True, mtime_ns=info.st_mtime_ns)

    async def keep(found: Unpacked) -> Entry:
        entry = Entry(remote.ref.id, remote.source, 1, found.files, found.folder, found.weights)
        cache.register(entry)
        return entry

    async def room(_place: Path, _more: int) -> None:
        """There is."""

    work = UnpackedFetch(cache, fetch, room, PolicyConfig(), lambda _: None)
    asyncio.run(work.run(remote, (), lambda *_: None, lambda *_: None, keep=keep))


class _Held:
    """What is unpacked stands still in its thread, until ``gate`` is set, or another event of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: Callable[[Unpacking], threading.Event] | None = None) -> None:
        self.gate, self._reached, write = threading.Event(), threading.Event(), Unpacking.write
        self.went_on = False

        def held(work: Unpacking, *args: Any) -> Any:
            self._reached.set()
            self.went_on = (self.gate if until is None else until(work)).wait(5)
            return write(work, *args)

        monkeypatch.setattr(Unpacking, "write", held)

    async def reached(self) -> None:
        await until(self._reached.is_set, "it to be unpacked")


def _telling(told: list[tuple[str, int, int]], what: str) -> Progress:
    return lambda done, total: told.append((what, done, total))
