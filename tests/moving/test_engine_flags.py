"""Flags of engines as keys of a pool."""

from __future__ import annotations

from typing import Any

import pytest

from tests.moving.moved import model, move

LLAMA: list[tuple[str, dict[str, Any], str, str]] = [
    ("-c 4096", {"ctx": 4096}, "-c", "mapped pools[].ctx"),
    ("--ctx-size=4096", {"ctx": 4096}, "--ctx-size=4096", "mapped pools[].ctx"),
    ("-c 0", {}, "-c", "needless without it the context is the model's own, too"),
    ("-c many", {}, "-c", "dropped it is no number of tokens: set `ctx` of the pool"),
    ("-np 4", {"slots": 4}, "-np", "mapped pools[].slots"),
    ("-np -1", {}, "-np", "needless it leaves the number to the engine; here it is `slots`"),
    ("-ngl 99", {}, "-ngl 99", "needless all layers are on the GPU"),
    (
        "-ngl 20",
        {},
        "-ngl 20",
        "dropped it may leave layers on the CPU; leave it out, all layers are placed on the GPU (GPU-only enforcement);"
        " with `profile: dev` it may stand in provisioning.flags",
    ),
    (
        "--n-cpu-moe 9",
        {},
        "--n-cpu-moe 9",
        "dropped it keeps experts in RAM (GPU-only enforcement); with `profile: dev` it may stand in provisioning.flags",
    ),
    ("--port 8999", {"provisioning": {"ports": [8999]}}, "--port", "mapped pools[].provisioning.ports"),
    ("--port ${PORT}", {}, "--port", "needless the daemon gives each engine a free port"),
    ("--host 0.0.0.0", {}, "--host", "needless engines listen on 127.0.0.1, behind the gateway"),
    ("--metrics", {}, "--metrics", "needless the daemon says it itself"),
    ("--alias gpt", {"served_name": "gpt"}, "--alias", "mapped pools[].served_name"),
    ("--alias a", {}, "--alias", "mapped pools[].served_name"),
    ("--alias x,y", {"provisioning": {"flags": ["--alias", "x,y"]}}, "--alias", "kept pools[].provisioning.flags"),
    (
        "-ts 3,1",
        {"devices": [0, 1], "tensor_split": [3, 1]},
        "-ts",
        "mapped pools[].tensor_split: one share for each of `devices`",
    ),
    ("-ts 0,1", {"devices": [1]}, "-ts", "mapped pools[].devices: one share for each of `devices`"),
    ("-ts x", {}, "-ts", "dropped the daemon sets it; use pools[].tensor_split"),
    ("-dev CUDA1", {"devices": [1]}, "-dev", "mapped pools[].devices: indices are in PCI order here"),
    (
        "-dev CUDA2,CUDA0",
        {"devices": [2, 0], "tensor_split": "auto"},
        "-dev",
        "mapped pools[].devices: indices are in PCI order here",
    ),
    ("-sm none -mg 1", {"devices": [1]}, "-sm", "mapped pools[].devices: one GPU"),
    (
        "-hf org/repo-GGUF:Q4",
        {},
        "-hf",
        "dropped allow it in `policy` and write `model: hf:ORG/REPO:QUANTISATION`, or name a file of yours (repo-GGUF-Q4.gguf)",
    ),
    ("--api-key abc", {}, "--api-key", "needless the engine is reached through the daemon alone; keys are the gateway's"),
    ("--rpc h:1", {}, "--rpc", "dropped it sends the model's work to other machines"),
    ("--jinja --no-mmap", {"provisioning": {"flags": ["--jinja", "--no-mmap"]}}, "--jinja", "kept pools[].provisioning.flags"),
    (
        "--brand-new 1",
        {"provisioning": {"flags": ["--brand-new", "1"]}},
        "--brand-new",
        "kept pools[].provisioning.flags: checked against what the engine lists when it starts",
    ),
    (
        "--mmproj /elsewhere/p.gguf",
        {"provisioning": {"flags": ["--mmproj", "/elsewhere/p.gguf"]}},
        "--mmproj",
        "kept pools[].provisioning.flags: the file must lie beside the model, or below the configuration's folder:"
        " else it is refused",
    ),
    ("--mmproj /m/p.gguf", {"provisioning": {"flags": ["--mmproj", "/m/p.gguf"]}}, "--mmproj", "kept pools[].provisioning.flags"),
]


@pytest.mark.parametrize(("flags", "pool", "flag", "became"), LLAMA, ids=[row[0] for row in LLAMA])
def test_a_flag_of_llama_server(flags: str, pool: dict[str, Any], flag: str, became: str) -> None:
    moved = move(model(f"llama-server -m /m/a.gguf {flags}"))
    assert moved.of(f"models.a.cmd {flag}") == [became]
    assert moved.pool == pool
    assert moved.config.pools[0].model == "file:/m/a.gguf"


def test_a_file_lies_beside_a_model_that_is_named_behind_it() -> None:
    moved = move(model("llama-server --mmproj /elsewhere/p.gguf -m /m/a.gguf"))
    assert "must lie beside the model" in moved.of("models.a.cmd --mmproj")[0]


VLLM: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "--max-model-len 8192",
        {"ctx": 81920, "slots": 10},
        "--max-model-len",
        "mapped pools[].ctx: ours is for all slots together, so it is × slots",
    ),
    ("--max-model-len 32k --max-num-seqs 2", {"ctx": 64_000, "slots": 2}, "--max-num-seqs", "mapped pools[].slots"),
    ("--max-model-len auto", {"slots": 10}, "--max-model-len", "dropped it is no number of tokens: set `ctx` of the pool"),
    ("-tp 2", {"slots": 10, "devices": [0, 1], "tensor_split": "auto"}, "-tp", "mapped pools[].tensor_split"),
    ("-tp 1", {"slots": 10}, "-tp", "needless without `tensor_split` the engine has one GPU"),
    (
        "--served-model-name x y",
        {"slots": 10, "served_name": "x", "aliases": ["y"]},
        "--served-model-name",
        "mapped pools[].served_name, aliases",
    ),
    (
        "--gpu-memory-utilization 0.9",
        {"slots": 10},
        "--gpu-memory-utilization",
        "needless 0.9 is what is reserved without `vram_bytes`",
    ),
    (
        "--gpu-memory-utilization 0.5",
        {"slots": 10},
        "--gpu-memory-utilization",
        "dropped set `vram_bytes` of the pool to 0.5 of the GPU's memory; without, it is 0.9",
    ),
    (
        "--trust-remote-code",
        {"slots": 10},
        "--trust-remote-code",
        "dropped it runs code that came with the model (policy.allow_remote_code)",
    ),
    (
        "--enforce-eager",
        {"slots": 10, "provisioning": {"flags": ["--enforce-eager"]}},
        "--enforce-eager",
        "kept pools[].provisioning.flags",
    ),
]


@pytest.mark.parametrize(("flags", "pool", "flag", "became"), VLLM, ids=[row[0] for row in VLLM])
def test_a_flag_of_vllm(flags: str, pool: dict[str, Any], flag: str, became: str) -> None:
    moved = move(model(f"vllm serve /m/a {flags} --port ${{PORT}}"))
    assert moved.of(f"models.a.cmd {flag}") == [became]
    assert moved.pool == pool
    assert (moved.config.pools[0].engine, moved.config.pools[0].model) == ("vllm", "file:/m/a")


def test_a_model_that_vllm_would_download_is_dropped() -> None:
    moved = move(model("vllm serve org/m"))
    assert moved.dropped() == ["models.a.cmd org/m"] and moved.config.pools[0].model == "file:models/m"


def test_the_name_that_vllm_goes_by_is_the_one_it_was_asked_by() -> None:
    moved = move(model("vllm serve /m/a --served-model-name x y", useModelName="y"))
    assert moved.config.pools[0].served_name == "y" and moved.config.pools[0].aliases == ("x",)


def test_of_a_flag_that_is_given_twice_the_last_counts() -> None:
    moved = move(model("llama-server -m /m/a -c 1 -c 2"))
    assert moved.of("models.a.cmd -c") == ["needless a later one wins", "mapped pools[].ctx"] and moved.pool == {"ctx": 2}


def test_the_gpus_that_a_command_is_shown_are_counted_from_those() -> None:
    shown = {"env": ["CUDA_VISIBLE_DEVICES=3,5,7"]}
    assert move(model("llama-server -m /m/a -dev CUDA2", **shown)).pool == {"devices": [7]}
    assert move(model("llama-server -m /m/a -ts 1,0,2", **shown)).pool == {"devices": [3, 7], "tensor_split": [1, 2]}
    assert move(model("llama-server -m /m/a", **shown)).pool == {"devices": [3, 5, 7], "tensor_split": "auto"}
    assert move(model("llama-server -m /m/a -sm row", **shown)).dropped() == ["models.a.cmd -sm"]
    assert move(model("vllm serve /m/a", **shown)).pool == {"devices": [3], "slots": 10}


@pytest.mark.parametrize(
    ("cmd", "engine", "url"),
    [
        ("docker run -p ${PORT}:80 vllm/vllm-openai", "vllm", "http://localhost:5800"),
        ("podman run -p ${PORT}:80 text-generation-inference", "tgi", "http://localhost:5800"),
        ("/opt/whisper-server --port ${PORT}", "llamacpp", "http://localhost:5800"),
        ("bash -c 'llama-server --port ${PORT}'", "llamacpp", "http://localhost:5800"),
    ],
)
def test_what_is_no_engine_of_ours_is_attached_to(cmd: str, engine: str, url: str) -> None:
    moved = move(model(cmd))
    (pool,) = moved.config.pools
    assert (pool.engine, pool.provisioning.mode, pool.provisioning.url) == (engine, "external", url)
    assert moved.dropped() == ["models.a.cmd"] and "# start it yourself, as: " in moved.text
    assert "together" not in moved.values


def test_a_program_elsewhere_keeps_its_address() -> None:
    moved = move(model("ssh gpu2 run", proxy="http://gpu2:9000/"))
    assert moved.config.pools[0].provisioning.url == "http://gpu2:9000"


def test_variables_may_stand_before_the_program() -> None:
    moved = move(model("env CUDA_VISIBLE_DEVICES=1 A=b llama-server -m /m/a"))
    assert moved.pool == {"devices": [1], "provisioning": {"env": {"A": "b"}}}
