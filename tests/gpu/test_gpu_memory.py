"""GPU memory is reserved once, and given again only when it is seen free."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GIB, cards, until
from tests.system.nodes import alive

ONE = cards(24)


def test_memory_that_an_ended_engine_still_holds_is_given_to_nobody(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("a", devices=[0], gib=20), fake("b", devices=[0], gib=20, preload=False)]
    node = make_node(ONE, "engines vram=19GiB", pools=pools).start()
    node.until_ready("a")
    until(lambda: node.device("0")["reservations"][0]["pids"], "the engine to be listed")
    engine = node.status("a")["pid"]
    node.become(ONE, f"process gpu=0 pid={engine} vram=19GiB")
    node.post("/v1/pools/a/stop")
    until(lambda: not alive(engine), "the engine to end")
    assert node.status("a")["phase"] == "stopping"
    until(lambda: node.status("a")["state"] == "failed", "patience to end")
    status = node.status("a")
    assert status["reason"] == "vram_held" and not status["live"]
    assert f"held by pid {engine}" in status["last_error"] and "19 GiB" in status["last_error"]
    node.post("/v1/pools/b/start")
    node.until_refused("b", "cannot start pool b: it needs 20 GiB on GPU 0", "pool a 20 GiB")

    node.become(ONE)
    until(lambda: node.status("a")["state"] == "offline", "the pool to be down by itself")
    node.until_ready("b")
    assert node.status("a")["state"] == "offline"


def test_a_start_beside_an_unmanaged_process_is_refused_with_its_name_until_it_ends(make_node: MakeNode, fake: MakePool) -> None:
    me = os.getpid()
    name = Path("/proc/self/comm").read_text().strip()
    node = make_node(ONE, f"process gpu=0 pid={me} vram=20GiB", pools=[fake("a", gib=10)]).start()
    error = node.until_refused("a", "it needs 10 GiB on GPU 0", "3.61 GiB of 24 GiB", f"pid {me} ({name}) 20 GiB")
    assert "the driver 400 MiB" in error and "free memory there" in error
    assert not (node.run / "engine-a.log").exists(), "no engine process was started for it"
    (unmanaged,) = node.device("0")["foreign"]
    assert (unmanaged["pid"], unmanaged["name"], unmanaged["vram_bytes"]) == (me, name, 20 * GIB)
    node.always = ()
    node.become(ONE)
    node.until_ready("a")
    assert node.status("a")["crash_count"] == 0


def test_of_two_starts_at_once_that_do_not_fit_together_one_runs(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake(name, gib=14, preload=False) for name in "ab"]
    node = make_node(ONE, "engines vram=1GiB", pools=pools).start()
    with ThreadPoolExecutor(2) as callers:
        answers = list(callers.map(lambda name: node.post(f"/v1/pools/{name}/start?wait=true"), "ab"))
    assert sorted(code for code, _ in answers) != [200, 200], answers
    until(lambda: any(node.status(name)["ready"] for name in "ab"), "one of them to be ready")
    winner, loser = sorted("ab", key=lambda name: not node.status(name)["ready"])
    node.until_refused(loser, f"cannot start pool {loser}: it needs 14 GiB", f"pool {winner} 14 GiB")
    (held,) = node.device("0")["reservations"]
    assert (held["pool_id"], held["reserved_bytes"]) == (winner, 14 * GIB)
    node.post(f"/v1/pools/{winner}/stop")
    node.until_ready(loser)


def test_a_stop_is_over_only_when_grandchildren_hold_no_memory_either(make_node: MakeNode, fake: MakePool) -> None:
    # The grandchildren leave the engine's session, ignore SIGTERM, and carry its mask: the driver lists them as well.
    family = fake("a", script=("--fork-grandchildren", "2", "--setsid"), devices=[0], gib=10)
    node = make_node(ONE, "engines vram=1GiB", pools=[family]).start()
    node.until_ready("a")
    until(lambda: len(node.device("0")["reservations"][0]["pids"]) == 3, "the whole family to be listed")
    (held,) = node.device("0")["reservations"]
    assert held["used_bytes"] == 3 * GIB and node.device("0")["foreign"] == []
    stop = node.post("/v1/pools/a/stop?wait=true")
    assert stop[0] == 200 and node.status("a")["state"] == "offline"
    assert [pid for pid in held["pids"] if alive(pid)] == []
    row = node.device("0")
    assert row["vram_used_bytes"] == 0 and row["reservations"] == [] == row["foreign"]


def test_a_grandchild_that_nothing_marks_is_its_pools_and_ends_with_it(make_node: MakeNode, fake: MakePool) -> None:
    """As vLLM's engine core after it has rewritten its title, here without its parent and session as well."""
    family = fake("a", script=("--orphans", "1"), devices=[0], gib=10)
    node = make_node(ONE, "engines vram=1GiB", pools=[family]).start()
    node.until_ready("a")
    said = next(line for line in node.get("/v1/pools/a/logs")[1].splitlines() if line.startswith("grandchild "))
    child = int(said.split()[1])
    node.become(ONE, "engines vram=1GiB", f"process gpu=0 pid={child} vram=2GiB")
    until(lambda: child in node.device("0")["reservations"][0]["pids"], "the grandchild to be the pool's")
    assert node.device("0")["foreign"] == []
    os.kill(parent_of(node.status("a")["pid"]), 9)  # its shim
    until(lambda: not alive(child), "the grandchild to be ended")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_grandchildren_that_the_driver_still_lists_keep_the_pool_from_being_down(make_node: MakeNode, fake: MakePool) -> None:
    family = fake("a", script=("--fork-grandchildren", "1", "--setsid"), devices=[0], gib=10)
    node = make_node(ONE, "engines vram=1GiB", pools=[family], gpu={"vram_wait_ms": 60_000}).start()
    node.until_ready("a")
    until(lambda: len(node.device("0")["reservations"][0]["pids"]) == 2, "the grandchild to be listed")
    child = next(pid for pid in node.device("0")["reservations"][0]["pids"] if pid != node.status("a")["pid"])
    node.become(ONE, f"process gpu=0 pid={child} vram=1GiB")
    node.post("/v1/pools/a/stop")
    until(lambda: not alive(child), "the grandchild to be ended")
    scanned = node.devices()["revision"]
    until(lambda: node.devices()["revision"] >= scanned + 3, "more scans of the GPU")
    assert node.status("a")["state"] == "stopping" and not node.status("a")["live"]
    node.become(ONE)
    until(lambda: node.status("a")["state"] == "offline", "the stop to be over")


def test_what_a_running_engine_holds_stays_its_own_when_its_daemon_dies(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("a", devices=[0], gib=20), fake("b", devices=[0], gib=10, preload=False)]
    node = make_node(ONE, "engines vram=19GiB", pools=pools).start()
    node.until_ready("a")
    until(lambda: node.device("0")["reservations"][0]["pids"], "the engine to be listed")
    before, engine = node.device("0"), node.status("a")["pid"]
    node.kill()
    node.start()
    node.until_ready("a")
    assert node.status("a")["pid"] == engine and node.status("a")["device_mask"] == "0"
    until(lambda: node.device("0")["reservations"][0]["pids"], "the engine to be known as its pool's again")
    after = node.device("0")
    assert after["reservations"] == before["reservations"] and after["foreign"] == before["foreign"] == []
    node.post("/v1/pools/b/start")
    node.until_refused("b", "cannot start pool b: it needs 10 GiB on GPU 0", "pool a 20 GiB")
    node.post("/v1/pools/a/stop")
    node.until_ready("b")
    assert not alive(engine)


def test_a_gpu_that_was_lost_while_no_daemon_looked_ends_the_engine_on_it(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(cards(24, 12), "engines vram=1GiB", pools=[fake("a", devices=[1], gib=2)]).start()
    node.until_ready("a")
    engine = node.status("a")["pid"]
    node.kill()
    node.become(cards(24, 12), "fault gpu=1 error=15")
    node.start()
    until(lambda: not alive(engine), "the engine on the lost GPU to be ended")
    until(lambda: node.status("a")["quarantined"], "the pool to be quarantined")
