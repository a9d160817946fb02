"""A vLLM pool over several GPUs: what its process sees, what it is told, and what is reserved. The engine is scripted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import MakeNode
from tests.gpu.nodes import GIB, Json, cards, scripted
from tests.host.simulated import gpu_uuid
from tests.models.test_safetensors_header import entry, write

CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128_256, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def llama_8b(open_dir: Path) -> Path:
    """The headers of an eight billion model: 16 GB that take no disk."""
    folder = open_dir / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write(folder / "model.safetensors", {"w": entry([8_000_000, 1_000], 0)})
    return folder


@pytest.fixture
def command(open_dir: Path) -> Path:
    return scripted(open_dir, name="vllm")


def vllm_pool(pool_id: str, model: Path, command: Path, **keys: Any) -> Json:
    how = {"mode": "binary", "binary": {"path": str(command)}}
    return {"id": pool_id, "engine": "vllm", "model": f"file:{model}", "ctx": 8192, "provisioning": how, **keys}


def test_it_takes_equal_parts_of_its_gpus_and_is_told_so(make_node: MakeNode, llama_8b: Path, command: Path) -> None:
    pools = [
        vllm_pool("both", llama_8b, command, devices=[0, 1], tensor_split="auto"),
        vllm_pool("single", llama_8b, command, devices=[2], vram_bytes="20GiB"),
        vllm_pool("late", llama_8b, command, preload=False),
    ]
    node = make_node(cards(24, 12, 80), pools=pools).start()
    node.until_ready("both", "single")
    argv = node.get("/v1/pools/both/command")[1]["argv"]
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.9"
    assert node.environment("both")["CUDA_VISIBLE_DEVICES"] == f"{gpu_uuid(0)},{gpu_uuid(1)}"
    reserved = [device["reservations"][0]["reserved_bytes"] for device in node.devices()["devices"]]
    assert reserved == [int(24 * GIB * 0.9), int(12 * GIB * 0.9), 20 * GIB]
    single = node.get("/v1/pools/single/command")[1]["argv"]
    assert (single[single.index("--tensor-parallel-size") + 1], single[single.index("--gpu-memory-utilization") + 1]) == (
        "1",
        "0.25",
    )
    assert node.status("both")["engine_version"] == "vllm-unknown" and node.status("both")["compute"] == "gpu"

    code, refused = node.post("/v1/pools/late/start?wait=true")
    assert code == 500 and "needs" in node.until_refused("late", "GiB", "may still be reserved"), refused


def test_what_cannot_be_divided_equally_is_refused_before_anything_is_started(
    make_node: MakeNode, llama_8b: Path, command: Path
) -> None:
    pools = [
        vllm_pool("silent", llama_8b, command, devices=[0, 1]),
        vllm_pool("uneven", llama_8b, command, devices=[0, 1], tensor_split=[2, 1]),
        vllm_pool("tight", llama_8b, command, devices=[1]),
    ]
    node = make_node(cards(24, 12), pools=pools).start()
    node.until_refused("silent", "cannot use 2 GPUs", "uses the first alone")
    node.until_refused("uneven", "divides equally")
    node.until_refused("tight", "cannot put the model on one GPU", "10.8 GiB")
    assert not node.lines("spawn")
    explained = node.command("explain", "silent").stdout
    assert explained.count("cannot use 2 GPUs") == 1 and "hint: " in explained and "tensor_split: auto" in explained
