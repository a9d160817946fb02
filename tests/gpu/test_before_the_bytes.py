"""What a model on a hub would need is said, and refused, before a byte of its weights is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import MakeNode
from tests.gpu.nodes import GIB, cards, run_cli, scripted
from tests.models.hub_beside import HubBeside
from tests.models.made_models import Maker
from tests.models.test_repository import BESIDE, WEIGHTS, repository

POLICY = (
    'policy: {allow_network: true, allow_schemes: [file, http], allow_domains: ["127.0.0.1"]}\nmodels: {keep_free_bytes: 0}\n'
)


def large_head(path: Path) -> bytes:
    """The header of a llama whose one matrix has 39 GiB; the file itself is not written."""
    import numpy as np

    made = Maker(path, "llama", layers=32)
    made.numbers(attention__head_count=32, attention__head_count_kv=8, feed_forward_length=1024)
    made.writer.add_tensor_info("blk.0.attn_q.weight", (39 * GIB // 8192 // 2, 8192), np.dtype(np.float16), 39 * GIB)
    made.writer.write_header_to_file()
    made.writer.write_kv_data_to_file()
    made.writer.write_ti_data_to_file()
    made.writer.close()
    return path.read_bytes()


HF_POLICY = POLICY.replace("file, http", "file, hf, http")


@pytest.fixture
def repository_hub() -> Iterator[HubBeside]:
    made = HubBeside(files=repository(), in_git=set(BESIDE))
    yield made
    made.end()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubBeside]:
    made = HubBeside(large_head(tmp_path / "head.gguf"))
    yield made
    made.end()


def large(hub: HubBeside, **keys: Any) -> dict[str, Any]:
    how = {"mode": "package", "flags": ["--threads", "1"]}
    return {"id": "large", "engine": "llamacpp", "model": f"{hub.hub.url}/m.gguf", "ctx": 4096, "provisioning": how, **keys}


def test_what_fits_on_no_gpu_is_refused_with_the_numbers_and_nothing_is_fetched(make_node: MakeNode, hub: HubBeside) -> None:
    node = make_node(cards(24, 12), pools=[large(hub)], more=POLICY).start()
    error = node.until_refused("large", "cannot start pool large: it needs 39", "has 23.6 GiB when it is empty")
    assert "smaller quantisation" in error and hub.hub.asked == [] and 0 < hub.hub.served <= 4_000_000
    told = node.get("/v1/pools/large/explain")[1]
    assert "its model is fetched first: 40 GiB; it is llama" in str(told["steps"]) and "it needs" in told["blockers"][0]
    shown = node.command("explain", "large")
    assert shown.returncode == 1 and "its model is fetched first: 40 GiB" in shown.stdout, shown
    read = [one for one in hub.hub.heads if one.range != "bytes=0-0"]
    assert len(read) == 1, "what was read once is not read again; a start asks whether it is still the same"


@pytest.mark.slow
def test_what_is_only_in_the_way_now_is_said_beforehand_and_does_not_keep_it_from_being_fetched(
    make_node: MakeNode, hub: HubBeside
) -> None:
    pools = [large(hub, preload=False)]
    node = make_node(cards(80), "process gpu=0 pid=4000000 vram=60GiB", pools=pools, more=POLICY).start()
    planned = node.command("models", "pull", pools[0]["model"], "--dry-run")
    assert planned.returncode == 0 and "would be fetched: 40 GiB" in planned.stdout, planned
    assert "llama, F32, trained for 32768 tokens of context" in planned.stdout
    assert "pool large: would not run now: cannot start pool large: it needs" in planned.stdout
    node.always = ()
    node.become(cards(80))
    planned = node.command("models", "pull", pools[0]["model"], "--dry-run")
    assert "pool large: 39.5 GiB" in planned.stdout and "on GPU 0 (NVIDIA GeForce RTX 3090)" in planned.stdout, planned
    told = node.get("/v1/pools/large/explain")[1]
    kinds = [step["kind"] for step in told["steps"]]
    assert kinds[-1] == "needs" and "memory" in kinds and not told["blockers"], told
    assert hub.hub.asked == []


def test_preflight_and_explain_say_what_a_start_would_refuse_before_anything_is_fetched(
    make_node: MakeNode, open_dir: Path, repository_hub: HubBeside
) -> None:
    node = make_node(cards(24), pools=[vllm(open_dir, "long", ctx=8192, preload=False)], more=HF_POLICY)
    node.env["HF_ENDPOINT"] = repository_hub.hub.url
    node.start()
    why = "says 512 at most"
    assert why in str(node.post("/v1/preflight")[1])
    assert why in str(node.get("/v1/pools/long/explain")[1]["blockers"])
    more = json.dumps(vllm(open_dir, "more", ctx=8192, preload=False))
    text = node.config.read_text().replace("pools: [", f"pools: [{more}, ")
    planned = node.post("/v1/apply?dry_run=true", {"text": text})[1]
    assert [(row["action"], why in str(row["problem"])) for row in planned["pools"]] == [("add", True)], planned
    node.post("/v1/pools/long/start")
    node.until_refused("long", why)
    assert [one.path for one in repository_hub.hub.asked if "/resolve/" in one.path] == []


def vllm(folder: Path, pool_id: str, **keys: Any) -> dict[str, Any]:
    how = {"mode": "binary", "binary": {"path": str(scripted(folder, name="vllm"))}}
    return {"id": pool_id, "engine": "vllm", "model": "hf:org/repo", "ctx": 256, "provisioning": how, **keys}


def test_a_repository_is_fetched_as_a_folder_for_vllm(make_node: MakeNode, open_dir: Path, repository_hub: HubBeside) -> None:
    hub = repository_hub.hub
    gguf = vllm(open_dir, "gguf", engine="llamacpp", provisioning={"mode": "package"}, preload=False)
    node = make_node(cards(24), pools=[vllm(open_dir, "whole", vram_bytes="2GiB"), gguf], more=HF_POLICY)
    node.env["HF_ENDPOINT"] = hub.url
    node.start()
    node.until_ready("whole")
    argv = node.get("/v1/pools/whole/command")[1]["argv"]
    folder = Path(argv[argv.index("serve") + 1])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*WEIGHTS, *{name.split("/")[0] for name in BESIDE}])
    rows = node.get("/v1/models")[1]
    assert [(row["verified"], row["pools"]) for row in rows] == [(True, ["gguf", "whole"])]
    assert "it is a directory" in str(node.get("/v1/pools/gguf/explain")[1]["blockers"])
    asked = len(hub.asked)
    hub.files["config.json"] = b'{"auto_map": {"AutoModel": "evil.Model"}}'
    told = node.command("models", "pull", "hf:org/repo@other", "--dry-run")
    assert told.returncode == 4 and "evil.py" in told.stderr and "policy.allow_remote_code" in told.stderr, told
    assert all("/api/models/" in one.path for one in hub.asked[asked:]), "the list of files alone"


@pytest.mark.slow
def test_run_chooses_the_context_and_the_gpus_that_fit(make_node: MakeNode, hub: HubBeside) -> None:
    node = make_node(cards(24, 24), pools=[], more=POLICY)  # its configuration alone: no daemon is needed
    told = run_cli("run", f"{hub.hub.url}/m.gguf", "--dry-run", "--config", str(node.config), folder=node.folder)
    assert told.returncode == 0 and "40 GiB to fetch" in told.stderr, told
    assert "It fits with 32768 tokens of context for one slot: " in told.stderr and "on GPU 1" in told.stderr
    assert "divided" in told.stderr and "ctx: 32768, slots: 1, tensor_split: auto}]" in told.stderr
    node.become(cards(24))
    told = run_cli("run", f"{hub.hub.url}/m.gguf", "--dry-run", "--config", str(node.config), folder=node.folder)
    assert told.returncode == 1 and "has 23.6 GiB when it is empty" in told.stderr, told
    assert hub.hub.asked == []
