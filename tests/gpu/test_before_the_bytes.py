"""What a model on a hub would need is said, and refused, before a byte of its weights is fetched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import MakeNode
from tests.gpu.nodes import GIB, cards
from tests.models.hub_app import Hub
from tests.models.made_models import Maker
from tests.models.test_lookahead import large_file

POLICY = (
    'policy: {allow_network: true, allow_schemes: [file, http], allow_domains: ["127.0.0.1"]}\nmodels: {keep_free_bytes: 0}\n'
)


class LargeHub:
    """A hub beside the test that has one file of 40 GiB, of which it has nothing but the header."""

    def __init__(self, head: bytes) -> None:
        self.hub = Hub(repository="org/large")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.hub.start(), self._loop).result(20)
        large_file(self.hub, head)

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self.hub.close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LargeHub]:
    made = LargeHub(large_head(tmp_path / "head.gguf"))
    yield made
    made.end()


def large(hub: LargeHub, **keys: Any) -> dict[str, Any]:
    how = {"mode": "package", "flags": ["--threads", "1"]}
    return {"id": "large", "engine": "llamacpp", "model": f"{hub.hub.url}/m.gguf", "ctx": 4096, "provisioning": how, **keys}


def test_what_fits_on_no_gpu_is_refused_with_the_numbers_and_nothing_is_fetched(make_node: MakeNode, hub: LargeHub) -> None:
    node = make_node(cards(24, 12), pools=[large(hub)], more=POLICY).start()
    error = node.until_refused("large", "cannot start pool large: it needs 39", "has 23.6 GiB when it is empty")
    assert "smaller quantisation" in error and hub.hub.asked == [] and 0 < hub.hub.served <= 4_000_000
    served = hub.hub.served
    told = node.get("/v1/pools/large/explain")[1]
    assert "its model is fetched first: 40 GiB; it is llama" in str(told["steps"]) and "it needs" in told["blockers"][0]
    shown = node.command("explain", "large")
    assert shown.returncode == 1 and "its model is fetched first: 40 GiB" in shown.stdout, shown
    assert hub.hub.served == served, "what was read once is not asked again"


def test_what_is_only_in_the_way_now_is_said_beforehand_and_does_not_keep_it_from_being_fetched(
    make_node: MakeNode, hub: LargeHub
) -> None:
    pools = [large(hub, preload=False)]
    node = make_node(cards(80), "process gpu=0 pid=4000000 vram=60GiB", pools=pools, more=POLICY).start()
    planned = node.command("models", "pull", pools[0]["model"], "--dry-run")
    assert planned.returncode == 0 and "would be fetched: 40 GiB" in planned.stdout, planned
    assert "llama, F32, trained for 32768 tokens of context" in planned.stdout
    assert "pool large: would not run now: cannot start pool large: it needs" in planned.stdout
    node.become(cards(80))
    node.post("/v1/devices/rescan")
    planned = node.command("models", "pull", pools[0]["model"], "--dry-run")
    assert "pool large: 4" in planned.stdout and "on GPU 0 (NVIDIA GeForce RTX 3090)" in planned.stdout, planned
    told = node.get("/v1/pools/large/explain")[1]
    kinds = [step["kind"] for step in told["steps"]]
    assert kinds[-1] == "needs" and "memory" in kinds and not told["blockers"], told
    assert hub.hub.asked == []


def test_preflight_says_it_too(make_node: MakeNode, hub: LargeHub) -> None:
    pools = [large(hub, preload=False, provisioning={"mode": "package", "flags": ["--threads", "1", "--no-such-flag"]})]
    node = make_node(cards(80), pools=pools, more=POLICY).start()
    report = node.get("/v1/preflight")[1]
    assert "no-such-flag" in str(report) and hub.hub.asked == []
