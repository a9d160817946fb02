"""The driver fails, hangs or crashes: nobody's engine is touched for it, and nothing starts unseen."""

from __future__ import annotations

import time

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GpuNode, cards, until
from tests.system.daemons import in_time
from tests.system.nodes import alive

ONE = cards(24)


def running(make_node: MakeNode, fake: MakePool) -> tuple[GpuNode, int]:
    """A node with pool a ready and pool b not started, and the engine's pid."""
    node = make_node(ONE, "engines vram=1GiB", pools=[fake("a", devices=[0], gib=2), fake("b", gib=2, preload=False)]).start()
    node.until_ready("a")
    return node, node.status("a")["pid"]


def goes_on(node: GpuNode, engine: int) -> None:
    status = node.status("a")
    assert status["ready"] and status["pid"] == engine and status["crash_count"] == 0


def test_after_a_driver_update_engines_go_on_and_new_ones_wait_with_the_remedy(make_node: MakeNode, fake: MakePool) -> None:
    node, engine = running(make_node, fake)
    node.become(ONE, "fault init=18", "fault scan=18")
    until(lambda: node.devices()["stale"], "the fault to be seen")
    assert node.post("/v1/pools/b/start")[0] == 202
    error = node.until_refused("b", "cannot start pool b: the GPUs cannot be scanned", "different versions")
    assert "reboot, or reload the nvidia kernel module" in error
    (blocker,) = node.get("/v1/pools/b/explain")[1]["blockers"]
    assert "different versions" in str(blocker)
    problem = node.devices()["problem"]
    assert problem["code"] == "driver_mismatch" and "reboot" in problem["hint"]
    assert node.metric("devices_stale") == 1
    goes_on(node, engine)
    node.become(ONE)
    node.until_ready("b")
    goes_on(node, engine)
    assert node.devices()["problem"] is None and node.metric("devices_stale") == 0


def test_a_driver_that_hangs_costs_a_worker_and_neither_answers_nor_engines(make_node: MakeNode, fake: MakePool) -> None:
    node, engine = running(make_node, fake)
    worker = node.workers()
    node.become(ONE, "fault hang=scan")
    answers, deadline = 0, time.monotonic() + 30
    while not node.devices()["stale"]:
        assert time.monotonic() < deadline
        assert node.get("/health")[0] == node.get("/metrics")[0] == 200
        goes_on(node, engine)
        answers += 1
        time.sleep(0.05)
    assert answers > 5, "nobody waited for the driver"
    found = node.devices()
    assert found["problem"]["code"] == "nvml_hung" and found["devices"][0]["vram_total_bytes"] > 0
    assert found["age_ms"] > 1000
    until(lambda: not alive(worker[0]), "the worker that hangs to be killed")
    node.become(ONE)
    until(lambda: not node.devices()["stale"], "a new worker to see the GPUs", 15)
    assert len(node.workers()) == 1 and node.workers() != worker
    assert node.device("0")["reservations"][0]["pids"] == [engine]
    goes_on(node, engine)


def test_a_driver_that_aborts_takes_only_the_worker_with_it(make_node: MakeNode, fake: MakePool) -> None:
    node, engine = running(make_node, fake)
    daemon, worker = node.pid, node.workers()
    node.become(ONE, "fault abort=scan")
    until(lambda: node.devices()["stale"], "the fault to be seen")
    assert node.devices()["problem"]["code"] == "nvml_crashed"
    assert not alive(worker[0]) and alive(daemon)
    node.post("/v1/pools/b/start")
    node.until_refused("b", "the GPUs cannot be scanned")
    node.become(ONE)
    node.until_ready("b")
    goes_on(node, engine)
    assert node.pid == daemon and len(node.workers()) == 1


def test_a_daemon_that_cannot_look_at_its_gpus_still_ends_soon(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(ONE, "engines vram=1GiB", pools=[fake("a", gib=2)], gpu={"vram_wait_ms": 60_000}).start()
    node.until_ready("a")
    engine = node.status("a")["pid"]
    node.become(ONE, "fault init=18", "fault scan=18")
    until(lambda: node.devices()["stale"], "the fault to be seen")
    assert in_time(18, lambda: node.terminate(timeout_s=20)) == 0
    assert not alive(engine)


def test_a_daemon_that_ends_does_not_wait_long_for_memory_that_is_not_given_back(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("early", gib=2), fake("late", gib=2)]
    node = make_node(ONE, "engines vram=1GiB", pools=pools, gpu={"vram_wait_ms": 60_000}).start()
    node.until_ready("early", "late")
    engines = [node.status(name)["pid"] for name in ("early", "late")]
    until(lambda: sorted(p for r in node.device("0")["reservations"] for p in r["pids"]) == sorted(engines), "both to be listed")
    node.become(ONE, *(f"process gpu=0 pid={engine} vram=1GiB" for engine in engines))
    node.post("/v1/pools/early/stop")
    until(lambda: not alive(engines[0]), "the engine of a pool that was stopped before to end")
    assert in_time(18, lambda: node.terminate(timeout_s=20)) == 0
    assert not alive(engines[1])


def test_a_daemon_whose_driver_hangs_from_the_start_serves_and_ends_all_the_same(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(ONE, "fault hang=init", pools=[fake("a", gib=2)])
    node.start()
    told = [line["action"] for line in node.lines()]
    assert "device_scan" not in told[: told.index("serving")], "it answers before it has heard of the driver"
    assert node.status("a")["state"] == "provisioning" and node.devices()["stale"]
    until(node.workers, "a worker to ask the driver")
    (worker,) = node.workers()
    assert in_time(18, lambda: node.terminate(timeout_s=20)) == 0
    assert not alive(worker)
