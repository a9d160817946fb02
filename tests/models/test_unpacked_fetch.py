"""Models in archives and images: fetched, unpacked, kept as what they are, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.models.leftovers import bytes_on_disk
from pool_managerd.models.refs import parse_ref
from tests.models.archives import Contents, device, folder, link, tar_of
from tests.models.fetching import Fetching, fetching
from tests.models.registry_app import Registry
from tests.models.test_repository import CONFIG, shard

OCI = {"allow_schemes": ["oci", "http"]}
GGUF = b"GGUF\x03\x00\x00\x00 and more"
PACK = "application/vnd.cncf.model."
DOCKER = "application/vnd.docker.ai."
MODEL = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": shard("a1")}
"""What an engine needs; README.md and the like it does not."""


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
    beside = tar_of({name: MODEL[name] for name in ("config.json", "tokenizer.json")})
    pooling = tar_of({"1_Pooling": folder, "1_Pooling/config.json": b"{}"})
    registry.put(
        "1", (MODEL["model.safetensors"], f"{DOCKER}safetensors", None), (beside, f"{DOCKER}vllm.config.tar", None),
        (pooling, f"{DOCKER}dir.tar", None), (b"MIT", f"{DOCKER}license", None),
        (b"{{ x }}", f"{DOCKER}chat.template.jinja", None),
    )  # fmt: skip
    async with fetching(tmp_path, policy=OCI) as f:
        assert await pulled(f, registry) == MODEL | {"1_Pooling/config.json": b"{}", "chat_template.jinja": b"{{ x }}"}
        assert not any(path.endswith(hashlib.sha256(b"MIT").hexdigest()) for path, _ in registry.asked)


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
        (b"no archive at all", f"{PACK}dataset.v1.tar", None),
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
