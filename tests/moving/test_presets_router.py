"""llama.cpp's own router beside what is made of its presets: the same keys count, and each model has the same flags."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.engines.flags import OptionTable, collapse
from pool_managerd.engines.llamacpp.options import recorded_options
from pool_managerd.moving.preset_keys import counting, merged, words
from pool_managerd.moving.presets_ini import read
from pool_managerd.wiring.imported_flags import flag_of_key
from tests.system.nodes import free_port

TEXT = """\
version = 1
; what all have
[*]
c = 512
mmap = off
temp = 0.5 ; half
embeddings = true
stop-timeout = 4
[one]
model = "/m/a b.gguf"
no-mmap = false
jinja = off
LLAMA_ARG_N_PARALLEL = 2
embeddings = off
LLAMA_ARG_BATCH = 64
[org/two:Q4] # of the cache
ctx-size = 64
c = 128
LLAMA_ARG_CTX_SIZE = 256
seed = 1
seed = -2
metrics = 0
flash-attn = on
chat-template-kwargs = {"a":"#b"}
samplers = top_k;temperature
LLAMA_ARG_THINK = none
webui = disabled
nkvo = yes
alias = x
[three]
LLAMA_ARG_NO_MMAP = true
"""
_SET_BY_ROUTER = {"--host", "--port", "--alias"}


def of_router(server: Path, file: Path) -> dict[str, list[str]]:
    """The arguments of each model, as the router tells them."""
    port = free_port()
    command = [str(server), "--models-preset", str(file), "--host", "127.0.0.1", "--port", str(port)]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "HF_"))}
    env = {**own, "HOME": str(file.parent), "LLAMA_CACHE": str(file.parent)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=file.parent, env=env) as router:
        try:
            listed = _models(f"http://127.0.0.1:{port}/models")
        finally:
            router.kill()
    return {model["id"]: model["status"]["args"][1:] for model in listed}


def _models(url: str) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return list(json.load(answer)["data"])
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, "the router does not answer"
            time.sleep(0.05)


def flags(table: OptionTable, argv: list[str]) -> dict[str, tuple[str, ...]]:
    """The flags by their one name, without those that the router sets itself."""
    return {use.name: use.values for use in collapse(table.parse(argv)).values() if use.name not in _SET_BY_ROUTER}


def test_the_router_gives_its_models_the_same_flags(llama_server: Path, tmp_path: Path) -> None:
    known = subprocess.run([str(llama_server), "--help"], capture_output=True, text=True, timeout=20, check=False).stdout
    if "--models-preset" not in known:
        pytest.skip(f"{llama_server} is too old to be a router")
    file = tmp_path / "presets.ini"
    file.write_text(TEXT)
    theirs = of_router(llama_server, file)
    table, found = recorded_options(), read(TEXT, "presets.ini")
    everywhere, _ = counting(found.everywhere, flag_of_key)
    assert "--mmap" in theirs["three"]  # and it is dropped here
    for model, entries in list(found.sections.items())[:2]:
        keys = merged(everywhere, counting(entries, flag_of_key)[0])
        ours = [word for key in keys if key.option not in ("stop-timeout", "--alias") for word in words(key)]
        assert flags(table, ours) == flags(table, theirs[model]), model
    assert set(theirs) - {"default"} == set(found.sections)
