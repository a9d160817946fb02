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

    until(
        lambda: all(reservation["pids"] for device in node.devices()["devices"] for reservation in device["reservations"]),
        "the engines to be listed on their GPUs",
    )
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
        assert share["vram_reserved_bytes"] == held["reserved_bytes"] > share["vram_used_bytes"] > 0
    totals = (held["reserved_bytes"], placed["devices"][0]["vram_used_bytes"])
    assert (placed["vram_reserved_bytes"], placed["vram_used_bytes"]) == totals
    assert placed["node_id"] and placed["replica_id"] == "r0" and placed["perf_hints"]["quantizations"] == [placed["quant"]]
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


def test_placement_counts_what_is_reserved_to_others_and_not_what_a_pool_was_reserved_itself(
    make_node: MakeNode, fake: MakePool
) -> None:
    pools = [fake("wide", devices=[0, 1], gib=2, tensor_split="auto"), fake("code", devices=[1], gib=8)]
    pools.append(fake("later", devices=[1], gib=1, preload=False))
    node = make_node(cards(24, 12), "engines vram=1GiB", pools=pools).start()
    node.until_ready("wide", "code")
    until(lambda: all(d["reservations"][0]["pids"] for d in node.devices()["devices"]), "both engines to be listed")
    answer = node.get("/v1/snapshots")[1]
    assert answer["devices_stale"] is False and answer["devices_problem"] is None and answer["devices_age_ms"] >= 0
    later, wide = answer["pools"][1], answer["pools"][2]
    assert (later["device_mask"], later["ctx_max"]) == ("1", 256) and later["model_id"] == wide["model_id"]
    assert wide["vram_free_bytes"] - wide["vram_available_bytes"] >= 7 * GIB, "what code was reserved is free and not to be had"
    refused = node.command("explain", "--place", "--pin", "wide", "--vram", "30GiB")
    assert refused.returncode == 1 and "of VRAM are free for it, 30 GiB are needed" in refused.stdout
    code = node.command("explain", "--place", "--pin", "code", "--vram", "7GiB", "-o", "json")
    assert code.returncode == 0, code.stdout
    shown = node.command("explain", "code").stdout
    assert "is ready already" in shown and "memory: 8 GiB reserved on GPU 1" in shown and "needs: as configured: 8 GiB" in shown


def test_an_exclusive_pool_shares_its_gpu_with_nobody(make_node: MakeNode, fake: MakePool) -> None:
    pools = [
        fake("alone", devices=[0], gib=2, exclusive=True),
        fake("other", devices=[0], gib=2, preload=False),
        fake("picky", devices=[1], gib=2, exclusive=True),
    ]
    unmanaged = f"process gpu=1 pid={OTHERS_PID} vram=1GiB"
    node = make_node(cards(24, 12), unmanaged, pools=pools).start()
    node.until_ready("alone")
    kept = node.device("0")
    assert (kept["vram_available_bytes"], kept["kept_for"]) == (0, "alone") and "; kept for pool alone" in node.command(
        "devices"
    ).stdout
    other = next(pool for pool in node.get("/v1/snapshots")[1]["pools"] if pool["pool_id"] == "other")
    assert other["vram_available_bytes"] == 0
    node.until_refused("picky", "cannot start pool picky on GPU 1", "the pool is exclusive", str(OTHERS_PID))
    node.post("/v1/pools/other/start")
    node.until_refused("other", "cannot start pool other on GPU 0", "pool alone is exclusive there")
    node.post("/v1/pools/alone/stop?wait=true")
    node.until_ready("other")
