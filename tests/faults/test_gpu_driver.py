"""Family F: the driver is absent, of another version, crashes, or says that memory is still held."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import wait_until
from tests.faults.conftest import Make, MakeNode, MakePool
from tests.faults.watched import WatchedGpuNode
from tests.gpu.nodes import cards, until
from tests.host.simulated import A100, MIG, gpu_uuid
from tests.system.nodes import alive

ONE = cards(24)
SEEN = "engines vram=1GiB"


def running(make_node: MakeNode, fake: MakePool) -> tuple[WatchedGpuNode, int]:
    """A node with pool a ready and pool b not started, and a's engine."""
    node = make_node(ONE, SEEN, pools=[fake("a", devices=[0], gib=2), fake("b", gib=2, preload=False)]).start()
    node.until_ready("a")
    return node, node.status("a")["pid"]


def goes_on(node: WatchedGpuNode, pid: int) -> None:
    status = node.status("a")
    assert (status["ready"], status["pid"], status["crash_count"]) == (True, pid, 0)


def test_F1_without_the_library_there_are_no_gpus_and_it_says_so(make: Make) -> None:
    daemon = make().start()

    def problem() -> str | None:
        return (daemon.get("/v1/devices")[1]["problem"] or {}).get("code")

    wait_until(lambda: problem() != "not_scanned", "the first scan", 10)
    assert daemon.get("/v1/devices")[1]["devices"] == []
    assert problem() in (None, "nvml_unavailable", "no_driver"), problem()
    daemon.preload("p")
    assert daemon.status()["ready"]


def test_F3_a_driver_of_another_version_stops_new_starts_and_nothing_else(make_node: MakeNode, fake: MakePool) -> None:
    node, pid = running(make_node, fake)
    node.become(ONE, "fault init=18", "fault scan=18")
    until(lambda: node.devices()["stale"], "the fault to be seen")
    node.post("/v1/pools/b/start")
    node.until_refused("b", "the GPUs cannot be scanned")
    assert node.devices()["problem"]["code"] == "driver_mismatch"
    goes_on(node, pid)
    node.become(ONE)
    node.until_ready("b")
    goes_on(node, pid)


def test_F5_a_driver_that_aborts_costs_a_worker_and_no_more(make_node: MakeNode, fake: MakePool) -> None:
    node, pid = running(make_node, fake)
    (worker,) = node.workers()
    node.become(ONE, "fault abort=scan")
    until(lambda: node.devices()["stale"], "the fault to be seen")
    wait_until(lambda: not alive(worker), "the worker to be gone", 10)
    goes_on(node, pid)
    node.become(ONE)
    until(lambda: not node.devices()["stale"], "another worker to see the GPUs", 20)
    goes_on(node, pid)


def test_F7_a_gpu_that_was_divided_makes_its_pools_invalid_and_gives_them_no_other(make_node: MakeNode, fake: MakePool) -> None:
    beside = f'gpu 1 uuid={gpu_uuid(1)} name="NVIDIA A100" pci=0000:02:00.0 cc=8.0 vram=80GiB reserved=600MiB'
    node = make_node(A100, SEEN, beside, pools=[fake("a", devices=[0], gib=5)]).start()
    node.until_ready("a")
    pid = node.status("a")["pid"]
    node.become(MIG)
    until(lambda: not alive(pid), "the engine to end", 20, lambda: node.status("a"))
    node.until_refused("a", "GPU 0 is in MIG mode now: name one of its instances")
    others = [row for row in node.devices()["devices"] if row["device"] != "0"]
    assert others and not [row for row in others if row["reservations"]], "it was not put elsewhere"
    node.become(A100)
    node.until_ready("a")


def test_F9_memory_that_an_ended_engine_still_holds_is_given_to_nobody(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("a", devices=[0], gib=20), fake("b", devices=[0], gib=20, preload=False)]
    node = make_node(ONE, "engines vram=19GiB", pools=pools).start()
    node.until_ready("a")
    until(lambda: node.device("0")["reservations"][0]["pids"], "the engine to be listed")
    pid = node.status("a")["pid"]
    node.become(ONE, f"process gpu=0 pid={pid} vram=19GiB")
    node.post("/v1/pools/a/stop")
    until(lambda: node.status("a")["state"] == "failed", "patience to end")
    assert node.status("a")["reason"] == "vram_held" and not alive(pid)
    node.post("/v1/pools/b/start")
    node.until_refused("b", "cannot start pool b: it needs 20 GiB on GPU 0")
    node.become(ONE)
    node.until_ready("b")


def test_F11_a_gpu_that_was_lost_is_used_again_after_its_probation(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(ONE, SEEN, pools=[fake("a", devices=[0], gib=2)]).start()
    node.until_ready("a")
    pid = node.status("a")["pid"]
    node.become(ONE, "fault gpu=0 error=15")
    until(lambda: not node.status("a")["ready"], "the loss to be seen")
    until(lambda: not alive(pid), "its engine to end")
    assert node.device("0")["state"] == "quarantined"
    node.become(ONE)
    node.until_device(lambda row: row["state"] == "probation", "probation")
    node.until_ready("a")
    assert node.device("0")["state"] == "ok" and node.status("a")["pid"] != pid


def test_F1_a_driver_that_cannot_be_loaded_does_not_end_the_check_either(make: Make) -> None:
    daemon = make().start()
    asked = [sys.executable, "-m", "pool_managerd.cli", "devices", "--url", f"http://127.0.0.1:{daemon.port}"]
    done = subprocess.run(
        asked, env={"POOL_MANAGERD_TOKEN": str(daemon.token), "AUTH_TOKEN": str(daemon.token)}, capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
