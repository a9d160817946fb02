"""A GPU that fails under an engine: its pool, and nobody else's, stops, waits and comes back."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GpuNode, cards, until
from tests.host.simulated import gpu_uuid
from tests.system.nodes import alive

TWO = cards(24, 12)
FELL_OFF = "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
NOT_ITS_OWN = "NVRM: Xid (PCI:0000:01:00): 31, pid=4711, name=llama-server, Ch 00000008, MMU Fault"


@pytest.fixture
def node(make_node: MakeNode, real: MakePool) -> GpuNode:
    """Two real engines, one on each GPU."""
    made = make_node(TWO, "engines vram=rss", pools=[real("a", devices=[0]), real("b", devices=[1])], kmsg=True).start()
    made.until_ready("a", "b")
    return made


def test_a_lost_gpu_ends_its_engine_at_once_and_is_used_again_after_probation(node: GpuNode) -> None:
    first, neighbour = node.status("a")["pid"], node.status("b")["pid"]
    node.become(TWO, "fault gpu=0 error=15")
    until(lambda: not node.status("a")["ready"], "the pool to be un-ready")
    error = node.status("a")["last_error"]
    assert "GPU 0 is quarantined: it is lost" in error and "reboot the machine" in error
    until(lambda: not alive(first), "its engine to end")
    row = node.device("0")
    assert (row["state"], row["cordoned"]) == ("quarantined", False) and "reboot" in row["remedy"]
    assert node.metric("device_quarantined", device="0") == 1 and node.metric("device_quarantined", device="1") == 0
    until(lambda: node.status("a")["phase"] == "down", "the stop to be over")
    code, refused = node.post("/v1/pools/a/start")
    assert code == 503 and "one of its GPUs is quarantined" in refused["message"], refused
    assert node.status("a")["last_error"] == error

    node.become(TWO)
    node.until_device(lambda row: row["state"] == "probation", "probation")
    assert not node.status("a")["live"], "it must not start before the GPU has proved itself"
    node.until_ready("a")
    assert node.device("0")["state"] == "ok"
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(0)
    assert node.status("b")["pid"] == neighbour and len(node.lines("restart")) == 1


def test_xids_of_the_driver_count_against_the_gpu_only_where_the_gpu_is_at_fault(node: GpuNode) -> None:
    first, neighbour = node.status("a")["pid"], node.status("b")["pid"]
    node.become(TWO, "xid gpu=0 code=31 serial=1")
    until(lambda: node.lines("xid"), "the Xid to be told of")
    assert node.metric("gpu_xid_total", device="0", xid="31") == 1
    assert node.status("a")["pid"] == first and node.status("a")["ready"] and node.device("0")["state"] == "ok"

    node.become(TWO, "xid gpu=0 code=31 serial=1", "xid gpu=0 code=79 serial=2")
    until(lambda: not node.status("a")["ready"], "the pool to be un-ready")
    assert "Xid 79: the GPU has fallen off the bus" in node.status("a")["last_error"]
    until(lambda: not alive(first), "its engine to end")
    assert node.device("0")["state"] == "quarantined", "it answers, but that is no proof that it was reset"
    node.become(TWO, "fault gpu=0 gone")
    node.until_device(lambda row: row["uuid"] == gpu_uuid(1), "the neighbour to move up to index 0")
    node.become(TWO)
    node.until_ready("a")
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(0)
    assert node.status("b")["pid"] == neighbour and node.status("b")["ready"]


def test_the_kernels_log_tells_of_a_failed_gpu_too_and_an_operator_may_clear_it(node: GpuNode) -> None:
    first, neighbour = node.status("a")["pid"], node.status("b")["pid"]
    with node.kernel_log.open("w") as log:
        log.write(f"{NOT_ITS_OWN}\n")
    until(lambda: node.lines("xid"), "the Xid to be told of")
    assert node.status("a")["pid"] == first and node.status("a")["ready"]
    with node.kernel_log.open("w") as log:
        log.write(f"{FELL_OFF}\n")
    until(lambda: not node.status("a")["ready"], "the pool to be un-ready")
    until(lambda: not alive(first), "its engine to end")
    assert node.command("devices", "uncordon", "0").returncode == 0
    node.until_ready("a")
    assert node.status("b")["pid"] == neighbour
    assert [(line["device"], line["xid"], line["level"]) for line in node.lines("xid")] == [("0", 31, "warn"), ("0", 79, "error")]


def test_a_pool_that_may_run_anywhere_moves_to_another_gpu(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(TWO, "engines vram=1GiB", pools=[fake("a", gib=4)]).start()
    node.until_ready("a")
    until(lambda: node.device("0")["reservations"][0]["pids"], "the engine to be listed")
    first = node.status("a")["pid"]
    node.become(TWO, "fault gpu=0 error=15")
    until(lambda: node.status("a")["pid"] not in (first, None), "the pool to move", 10, lambda: node.status("a"))
    node.until_ready("a")
    assert node.environment("a")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1)
    assert not alive(first)


def test_a_flood_of_harmless_xids_does_not_hide_a_fatal_one(node: GpuNode) -> None:
    neighbour = node.status("b")["pid"]
    flood = NOT_ITS_OWN.replace("01:00", "02:00") + "\n"
    with node.kernel_log.open("w") as log:
        log.write(f"{flood * 2000}{FELL_OFF}\n{flood * 2000}")
    until(lambda: not node.status("a")["ready"], "the pool on the GPU that fell off to be un-ready")
    assert node.status("b")["ready"] and node.status("b")["pid"] == neighbour
    assert len(node.lines("xid")) < 500, "and the flood does not reach the journal either"


def test_a_gpu_that_cannot_be_read_for_a_while_costs_its_engine_nothing(make_node: MakeNode, real: MakePool) -> None:
    node = make_node(TWO, "engines vram=rss", pools=[real("a", devices=[0])]).start()
    node.until_ready("a")
    pid = node.status("a")["pid"]
    node.become(TWO, "fault gpu=0 error=999")
    node.until_device(lambda row: not row["readable"], "the GPU to be unreadable")
    assert node.device()["state"] == "ok" and node.status("a")["ready"] and node.status("a")["pid"] == pid
    node.become(TWO)
    node.until_device(lambda row: row["readable"], "the GPU to be readable again")
    assert node.status("a")["pid"] == pid and node.status("a")["crash_count"] == 0


def test_a_contained_memory_error_ends_no_pool(make_node: MakeNode, real: MakePool) -> None:
    node = make_node(TWO, "engines vram=rss", "ecc gpu=0 uncorrected=0", pools=[real("a", devices=[0]), real("b", devices=[0])])
    node.start().until_ready("a", "b")
    pids = [node.status(pool)["pid"] for pool in "ab"]
    node.always = ("engines vram=rss",)
    node.become(TWO, "ecc gpu=0 uncorrected=1", "xid gpu=0 code=94 serial=1")
    node.until_device(lambda row: row["ecc_uncorrected"] == 1, "the error to be counted")
    revision = node.devices()["revision"]
    until(lambda: node.devices()["revision"] > revision + 3, "some more scans of the GPUs", 30)
    assert [node.status(pool)["pid"] for pool in "ab"] == pids and node.device()["state"] == "ok"


def test_drain_and_reset_takes_a_gpu_out_of_use_and_ends_nothing(make_node: MakeNode, real: MakePool) -> None:
    node = make_node(TWO, "engines vram=rss", pools=[real("a", devices=[0])]).start()
    node.until_ready("a")
    pid = node.status("a")["pid"]
    node.become(TWO, "recovery gpu=0 action=4")
    node.until_device(lambda row: row["state"] == "quarantined", "the GPU to be out of use")
    assert "drain and reset" in node.device()["reason"] and not node.status("a")["ready"] and node.status("a")["pid"] == pid
    node.become(TWO, "recovery gpu=0 action=0")
    node.until_ready("a")
    assert node.status("a")["pid"] == pid


def test_a_reset_that_was_due_before_the_daemon_started_is_seen(make_node: MakeNode, real: MakePool) -> None:
    node = make_node(TWO, "recovery gpu=0 action=1", pools=[real("a", devices=[0])]).start()
    node.until_device(lambda row: row["state"] == "quarantined", "the GPU to be out of use")
    assert "nvidia-smi --gpu-reset" in node.device()["remedy"] and not node.status("a")["live"]
