"""Whole repositories as folders: which files of one are fetched, each verified, and the folder there when all of them are."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pool_managerd.config import PolicyConfig, PoolConfig
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.models.hub import HubFile, HubListing
from pool_managerd.models.refs import parse_ref
from pool_managerd.models.repository import check_code, needed_files
from pool_managerd.models.safetensors_header import read_safetensors_shape
from tests.models.fetching import fetching
from tests.models.hub_app import COMMIT, Hub
from tests.models.test_safetensors_header import entry

REF = "hf:org/repo"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "max_position_embeddings": 512, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
BESIDE = ["1_Pooling/config.json", "config.json", "model.safetensors.index.json", "tokenizer.json"]


def shard(*tensors: str) -> bytes:
    header = {name: entry([64, 1_000], number * 128_000) for number, name in enumerate(tensors)}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes([int(tensors[0][-1], 36)]) * 128_000 * len(tensors)


def repository() -> dict[str, bytes]:
    files = {name: shard(f"layer.{number}", f"layer.{number}.norm") for number, name in enumerate(WEIGHTS)}
    named = {f"layer.{number}{tail}": name for number, name in enumerate(WEIGHTS) for tail in ("", ".norm")}
    return files | {
        "config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "1_Pooling/config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": named}).encode(), "README.md": b"#", ".gitattributes": b"",
        "pytorch_model.bin": b"PK", "pytorch_model.bin.index.json": b"{}", "original/consolidated.00.pth": b"PK",
        "onnx/model.onnx": b"x", "consolidated.safetensors": shard("all"), "helper.py": b"import os", "LICENSE.txt": b"MIT",
        "training_args.bin": b"PK", "trainer_state.json": b"{}", "model.fp16.gguf": b"GGUF",
    }  # fmt: skip


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files=repository(), in_git={*BESIDE, "README.md"}).start()
    yield made
    await made.close()


def fetched(hub: Hub) -> list[str]:
    return [asked.path.partition(COMMIT + "/")[2] for asked in hub.asked if "/resolve/" in asked.path]


async def test_a_repository_is_a_folder_of_what_an_engine_needs_all_of_it_verified(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        model = await f.models.ensure_present(REF)
        folder = Path(model.local_path)
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert found == sorted([*WEIGHTS, *BESIDE]) == sorted(fetched(hub))
        assert all((folder / name).read_bytes() == hub.files[name] for name in found)
        assert model.verified and model.files == () and [Path(path).name for path in model.weights] == WEIGHTS
        digests = [f"sha256:{hashlib.sha256(hub.files[name]).hexdigest()}" for name in WEIGHTS]
        assert model.digest == ",".join(digests)
        assert model.size_bytes == sum(len(hub.files[name]) for name in found)
        assert folder.stat().st_mode & 0o777 == 0o755 and (folder / "1_Pooling").stat().st_mode & 0o777 == 0o755
        assert list((f.cache.root / "partial").iterdir()) == []
        asked = len(hub.asked)
        assert (await f.models.ensure_present(REF, digests)).verified and len(hub.asked) == asked
        wrong = await f.refusal(REF, "sha256:" + "0" * 64)
        assert "3 files of weights" in wrong.message


async def test_another_name_of_the_same_commit_is_the_same_folder(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        first = await f.models.ensure_present(REF)
        before = len(fetched(hub))
        second = await f.models.ensure_present("hf:org/repo@main")
        assert second.local_path == first.local_path and len(fetched(hub)) == before
        shelf = f.shelf
        rows = await shelf.cached()
        assert [(row["path"], row["files"], row["untouched"]) for row in rows] == [(first.local_path, 7, True)] * 2
        assert await shelf.remove(REF) == 0 and await shelf.remove("hf:org/repo@main") == first.size_bytes
        assert not Path(first.local_path).exists()


async def test_files_are_fetched_beside_each_other_and_the_folder_is_there_when_all_are(hub: Hub, tmp_path: Path) -> None:
    gate, begun, most = asyncio.Event(), 0, 0

    async def held(request: web.Request) -> web.StreamResponse:
        nonlocal begun, most
        begun += 1
        most = max(most, begun)
        if begun == 3:
            gate.set()
        await gate.wait()
        begun -= 1
        return await hub.usual(request)

    hub.script = [*[None] * len(BESIDE), held, held, held]
    async with fetching(tmp_path, hub.url) as f:
        told = list[tuple[int, int]]()
        model = await asyncio.wait_for(f.models.ensure_present(REF, progress=lambda done, total: told.append((done, total))), 20)
        assert most == 3 and told[-1] == (model.size_bytes, model.size_bytes)
        assert [done for done, _ in told] == sorted(done for done, _ in told)


async def test_what_fails_on_the_way_leaves_no_folder_and_the_next_try_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.digests[WEIGHTS[2]] = "0" * 64
    async with fetching(tmp_path, hub.url) as f:
        assert (await f.refusal(REF)).code == "DIGEST_MISMATCH"
        assert not (f.cache.root / f"hf/org/repo/{COMMIT}-all").exists() and f.cache.all() == []
        del hub.digests[WEIGHTS[2]]
        before = fetched(hub)
        assert (await f.models.ensure_present(REF)).verified
        again = fetched(hub)[len(before) :]
        assert WEIGHTS[2] in again and not set(BESIDE) & set(again), "what is there already is not fetched again"


async def test_a_small_file_that_is_not_what_git_has_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.digests["tokenizer.json"] = "1" * 40
    async with fetching(tmp_path, hub.url) as f:
        error = await f.refusal(REF)
        assert error.code == "DIGEST_MISMATCH" and "tokenizer.json" in error.message
        assert not set(WEIGHTS) & set(fetched(hub)), "what is small comes first"


@pytest.mark.parametrize("small", [True, False])
async def test_code_and_pickles_come_only_where_the_policy_says_so(hub: Hub, tmp_path: Path, *, small: bool) -> None:
    hub.in_git -= set() if small else {"config.json"}  # else the hub knows its sha256
    hub.files["config.json"] = json.dumps(CONFIG | {"auto_map": {"AutoModel": "org/other--modeling_evil.Model"}}).encode()
    async with fetching(tmp_path / "a", hub.url) as f:
        for error in (await f.refusal(REF), await foreseen_error(f, REF)):
            assert error.code == "POLICY_DENIED" and "modeling_evil.py" in error.message
            assert "policy.allow_remote_code: true" in (error.hint or "")
        assert not set(WEIGHTS) & set(fetched(hub))
    async with fetching(tmp_path / "b", hub.url, policy={"allow_remote_code": True}) as f:
        assert (Path((await f.models.ensure_present(REF)).local_path) / "helper.py").is_file()
    hub.files = {name: body for name, body in hub.files.items() if not name.endswith(".safetensors")}
    hub.files["config.json"] = json.dumps(CONFIG).encode()
    async with fetching(tmp_path / "c", hub.url) as f:
        error = await f.refusal(REF)
        assert error.code == "POLICY_DENIED" and "pytorch_model.bin" in error.message
        assert "policy.allow_pickle: true" in (error.hint or "")
    async with fetching(tmp_path / "d", hub.url, policy={"allow_pickle": True}) as f:
        assert [Path(path).name for path in (await f.models.ensure_present(REF)).weights] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["tok.Slow", null]}}'),
        ("config.json", b'{"text_config": {"auto_map": "evil"}}'), ("config.json", b'{"auto_map": [1]}'),
        ("config.json", b'{"auto_map": {"A": "evil.B"}, "auto_map": null}'),
        ("config.json", b"[" * 100_000), ("config.json", b'{"pad": "' + b" " * (5 << 20) + b'"}'),
    ],
)  # fmt: skip
def test_code_is_found_wherever_it_is_named(name: str, content: bytes) -> None:
    with pytest.raises(SpecError, match="auto_map"):
        check_code(parse_ref(REF), name, content, PolicyConfig())
    check_code(parse_ref(REF), name, content, PolicyConfig(allow_remote_code=True))


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b'{"auto_map": {}}', b'{"a": 1}'])
def test_settings_that_name_no_code_are_left_to_the_engine(content: bytes) -> None:
    check_code(parse_ref(REF), "config.json", content, PolicyConfig())


async def foreseen_error(f: Any, ref: str) -> PoolError:
    with pytest.raises(PoolError) as caught:
        await f.models.foresee(ref)
    return caught.value


async def test_the_shape_of_a_folder_is_known_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        ahead = await f.models.foresee(REF)
        assert ahead is not None and ahead.shape is not None and hub.served < 3 * 64_000 + 2_000
        expected = f.models.expected(REF)
        assert expected is not None and [path.name for path in Path(expected.local_path).iterdir()] == ["config.json"]
        assert f.models.shapes.of(Path(expected.local_path)) == ahead.shape
        model = await f.models.ensure_present(REF)
        assert read_safetensors_shape(model.local_path) == ahead.shape and model.size_bytes == ahead.size_bytes
        assert not Path(expected.local_path).exists()


def listing(*names: str, size: int = 1) -> HubListing:
    return HubListing(COMMIT, tuple(HubFile(name, size, "0" * 64) for name in names))


def chosen(*names: str, **policy: Any) -> list[str]:
    rules = PolicyConfig.model_validate(policy)
    weights, beside = needed_files(parse_ref(REF), listing("config.json", *names), rules)
    return [file.path for file in (*weights, *beside)]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["pytorch_model-00001-of-00001.safetensors", "x.safetensors"], ["pytorch_model-00001-of-00001.safetensors"]),
        (["a.safetensors", "b.safetensors", "original/c.safetensors"], ["a.safetensors", "b.safetensors"]),
    ],
)  # fmt: skip
def test_a_model_that_is_there_several_times_is_fetched_once(names: list[str], weights: list[str]) -> None:
    assert chosen(*names) == [*weights, "config.json"]


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (listing("model.safetensors"), "no config.json"),
        (listing("config.json", "m-Q4_K_M.gguf"), "no safetensors weights"),
        (listing("config.json", *(f"w{number}.safetensors" for number in range(10_000))), "10000 files of weights"),
        (listing("config.json", "model.safetensors", *(f"{number}.json" for number in range(1_000))), "1001 beside them"),
        (listing("config.json", "model.safetensors", size=1 << 30), "larger than 64 MiB"),
        (listing(), "no safetensors weights"),
    ],
)  # fmt: skip
def test_what_is_no_model_or_too_much_is_refused_with_what_there_is(files: HubListing, why: str) -> None:
    with pytest.raises(SpecError, match=why) as caught:
        needed_files(parse_ref(REF), files, PolicyConfig())
    assert "it has: " in (caught.value.hint or "") and len(caught.value.hint or "") < 1_000


async def test_names_that_lead_elsewhere_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"../../x.json": b"{}", "/etc/x.json": b"{}", "a\\b.json": b"{}", "n" * 300 + ".json": b"{}", "a\nb.json": b"{}"}
    async with fetching(tmp_path, hub.url) as f:
        await f.models.ensure_present(REF)
    assert sorted(fetched(hub)) == sorted([*WEIGHTS, *BESIDE])


def test_digests_by_the_names_of_files_are_those_in_the_order_of_the_names() -> None:
    digests = {"b.safetensors": "sha256:" + "b" * 64, "a.safetensors": "sha256:" + "a" * 64}
    how = {"model": {"checksum": digests}}
    pool = PoolConfig.model_validate({"id": "a", "engine": "vllm", "model": REF, "provisioning": how})
    assert pool.checksums == (digests["a.safetensors"], digests["b.safetensors"])
