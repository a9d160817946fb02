"""What an engine is shown of the GPUs, and what everybody else is told of it."""

from __future__ import annotations

import json

import pytest

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GIB, OTHERS_PID, cards, until
from tests.host.simulated import gpu_uuid


def test_an_engine_sees_exactly_its_gpus_and_every_view_tells_the_same_of_them(make_node: MakeNode, real: MakePool) -> None:
    # Card 2 comes first in the mask and sits in the last slot: the engine counts its GPUs by slot all the same.
    pools = [real("pair", devices=[2, 0]), real("one", devices=[1])]
    node = make_node(cards(24, 12, 16), "engines vram=rss", pools=pools).start()
    node.until_ready("pair", "one")
    shown = node.environment("pair")
    assert shown["CUDA_VISIBLE_DEVICES"] == f"{gpu_uuid(0)},{gpu_uuid(2)}"
    assert shown["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert node.environment("one")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1)

    until(lambda: node.device("1")["reservations"][0]["pids"], "the engine to be listed on its GPU")
    told = node.devices()
    assert json.loads(node.command("devices", "-o", "json").stdout)["devices"][0].keys() == told["devices"][0].keys()
    assert (told["simulated"], told["stale"], told["problem"]) == (True, False, None)
    engine = node.status("one")
    (held,) = told["devices"][1]["reservations"]
    assert (held["pool_id"], held["pids"], held["exclusive"]) == ("one", [engine["pid"]], False)
    assert held["reserved_bytes"] > held["used_bytes"] > 0
    assert [device["foreign"] for device in told["devices"]] == [[], [], []]
    for device in (told["devices"][0], told["devices"][2]):
        assert [r["pids"] for r in device["reservations"]] == [[node.status("pair")["pid"]]]

    (placed,) = [p for p in node.get("/v1/snapshots")[1]["pools"] if p["pool_id"] == "one"]
    for source in (engine, placed):
        (share,) = source["devices"]
        assert (share["device"], share["uuid"]) == ("1", gpu_uuid(1))
        assert share["vram_total_bytes"] == source["vram_total_bytes"] == 12 * GIB
        assert source["vram_available_bytes"] == 12 * GIB - 400 * (1 << 20) - held["reserved_bytes"]
    assert engine["compute"] == "gpu" and placed["compute_capability"] == "8.6"
    assert node.metric("vram_total_bytes", device="1") == node.metric("pool_vram_total_bytes", pool_id="one") == 12 * GIB
    assert node.metric("vram_reserved_bytes", device="1") == held["reserved_bytes"]
    assert 0 < (node.metric("vram_used_bytes", device="1", pool_id="one") or 0) < held["reserved_bytes"]
    free = 12 * GIB - 400 * (1 << 20) - (node.metric("vram_used_bytes", device="1", pool_id="one") or 0)
    assert node.metric("pool_vram_free_bytes", pool_id="one") == node.metric("vram_free_bytes", device="1") == free


def test_only_a_model_larger_than_one_gpu_is_split_and_its_shares_sum_to_one(make_node: MakeNode, real: MakePool) -> None:
    pools = [real("wide", tensor_split="auto", gib=30), real("small", tensor_split="auto", gib=2, preload=False)]
    node = make_node(cards(24, 12), pools=pools).start()
    node.until_ready("wide")
    assert node.environment("wide")["CUDA_VISIBLE_DEVICES"] == f"{gpu_uuid(0)},{gpu_uuid(1)}"
    argv = node.get("/v1/pools/wide/command")[1]["argv"]
    shares = [float(share) for share in argv[argv.index("--tensor-split") + 1].split(",")]
    assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=1e-5) and shares[0] > shares[1] > 0.1
    reserved = [device["reservations"][0]["reserved_bytes"] for device in node.devices()["devices"]]
    assert 29.9 * GIB < sum(reserved) < 30.1 * GIB
    assert node.post("/v1/pools/small/start?wait=true")[0] == 200
    assert "--tensor-split" not in node.get("/v1/pools/small/command")[1]["argv"]
    assert node.environment("small")["CUDA_VISIBLE_DEVICES"] in (gpu_uuid(0), gpu_uuid(1))


def test_an_exclusive_pool_shares_its_gpu_with_nobody(make_node: MakeNode, fake: MakePool) -> None:
    pools = [
        fake("alone", devices=[0], gib=2, exclusive=True),
        fake("other", devices=[0], gib=2, preload=False),
        fake("picky", devices=[1], gib=2, exclusive=True),
    ]
    stranger = f"process gpu=1 pid={OTHERS_PID} vram=1GiB"
    node = make_node(cards(24, 12), stranger, pools=pools).start()
    node.until_ready("alone")
    node.until_refused("picky", "cannot start pool picky on GPU 1", "the pool is exclusive", str(OTHERS_PID))
    node.post("/v1/pools/other/start")
    node.until_refused("other", "cannot start pool other on GPU 0", "pool alone is exclusive there")
    node.post("/v1/pools/alone/stop?wait=true")
    node.until_ready("other")
