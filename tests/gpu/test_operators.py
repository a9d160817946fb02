"""What an operator decides about GPUs, what is refused at the start, and what is left in the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import cards, children, run_cli, until
from tests.host.simulated import gpu_uuid, topology
from tests.system.nodes import alive, left_behind, mentioning

TWO = cards(24, 12)


def test_a_mistake_in_the_topology_of_simulated_gpus_is_told_once_while_they_stay_as_they_were(
    make_node: MakeNode, fake: MakePool
) -> None:
    node = make_node(cards(24), pools=[fake("a", gib=1)]).start()
    node.until_ready("a")
    node.become(cards(24), "fault gpu=0 lost")
    until(lambda: [line for line in node.lines("notice") if "stay as they were" in line["human"]], "the mistake to be told of")
    (told,) = (line["human"] for line in node.lines("notice") if "stay as they were" in line["human"])
    assert ":4:" in told or "line 4" in told, told
    assert node.device("0")["state"] == "ok" and node.status("a")["ready"]


def test_a_cordon_is_durable_keeps_what_runs_and_ends_with_a_word(make_node: MakeNode, fake: MakePool) -> None:
    pools = [fake("pinned", devices=[0], gib=2), fake("free", gib=2, preload=False)]
    node = make_node(TWO, "engines vram=1GiB", pools=pools).start()
    node.until_ready("pinned")
    done = node.command("devices", "cordon", "0")
    assert done.returncode == 0 and "cordoned" in done.stdout
    assert node.status("pinned")["ready"], "what runs goes on"
    assert node.post("/v1/pools/free/start?wait=true")[0] == 200
    assert node.environment("free")["CUDA_VISIBLE_DEVICES"] == gpu_uuid(1), "the other GPU has less room, but is not cordoned"

    engine = node.status("pinned")["pid"]
    node.kill()
    node.start()
    assert node.device("0")["cordoned"] and node.device("0")["state"] == "ok"
    node.until_ready("pinned")
    assert node.status("pinned")["pid"] == engine, "what runs goes on under the next daemon, too"
    os.kill(engine, signal.SIGKILL)
    error = node.until_refused("pinned", "cannot start pool pinned: GPU 0 is cordoned")
    assert "pool-managerd devices uncordon 0" in error
    assert not alive(engine)
    assert node.post("/v1/devices/0/uncordon")[0] == 200
    node.post("/v1/pools/pinned/start")
    node.until_ready("pinned")
    node.kill()
    node.start()
    assert not node.device("0")["cordoned"]


def test_released_devices_let_the_driver_go_until_they_are_resumed(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(TWO, pools=[fake("a", devices=[0], gib=2), fake("b", gib=2, preload=False)]).start()
    node.until_ready("a")
    (worker,) = node.workers()
    engine = node.status("a")["pid"]
    released = node.command("devices", "release")
    assert released.returncode == 0
    engines, hint = released.stdout.splitlines()[:2]
    assert engines == "The engines of 1 pool still use the driver."
    assert hint.startswith("hint: ") and hint.endswith("pool-managerd drain a"), "as it can be typed here"
    assert not alive(worker) and node.workers() == []
    node.post("/v1/pools/b/start")
    node.until_refused("b", "cannot start pool b: the GPUs cannot be scanned", "released on request", "devices resume")
    assert node.status("a")["ready"] and node.status("a")["pid"] == engine and node.workers() == []
    placed = node.command("explain", "--place").stdout.splitlines()
    assert placed[0].startswith("The metrics of the GPUs are stale, last read ") and "released on request" in placed[0]
    assert node.get("/v1/snapshots")[1]["devices_stale"] is True
    assert node.command("devices", "resume").returncode == 0
    node.until_ready("b")
    assert node.status("a")["pid"] == engine and len(node.workers()) == 1


@pytest.mark.parametrize(
    ("profile", "text", "env", "says", "code"),
    [
        ("dev", "gpu 0 vram=24GiB\ngpu 1 vram=12\n", {}, "gpus:2: vram= must be a size with a unit", 2),
        ("dev", None, {}, "cannot read the simulated GPUs of", 2),
        ("home", TWO, {}, "cannot simulate GPUs (gpu.simulate) in profile home: set `profile: dev`", 2),
        ("dev", TWO, {"PATH": "/nowhere"}, "there is no C compiler", 1),
    ],
    ids=["a wrong line", "no file", "profile home", "no compiler"],
)
def test_simulated_gpus_that_cannot_be_are_refused_at_the_start(
    profile: str, text: str | None, env: dict[str, str], says: str, code: int, open_dir: Path
) -> None:
    config, gpus = open_dir / "pm.yaml", open_dir / "gpus"
    config.write_text(f"profile: {profile}\ndaemon: {{bind: '127.0.0.1:0', runtime_dir: run, state_dir: state}}\n")
    if text is not None:
        gpus.write_text(text)
    refused = run_cli("serve", "--config", str(config), "--simulate-gpus", "gpus", folder=open_dir, **env)
    assert refused.returncode == code and says in refused.stderr, refused
    assert "Traceback" not in refused.stderr


def test_a_topology_that_turns_bad_changes_nothing_until_it_is_good_again(make_node: MakeNode) -> None:
    node = make_node(TWO, pools=[]).start()
    until(lambda: len(node.devices()["devices"]) == 2, "the GPUs")
    topology(node.gpus, "gpu 0 vram=lots\n")
    scanned = node.devices()["revision"]
    until(lambda: node.devices()["revision"] > scanned, "another scan")
    assert [row["uuid"] for row in node.devices()["devices"]] == [gpu_uuid(0), gpu_uuid(1)]
    node.become(cards(24))
    until(lambda: [row["name"] for row in node.devices()["devices"]][1:] == ["gone"], "the second GPU to be gone")
    assert node.device("1")["uuid"] == gpu_uuid(1) and node.metric("device_quarantined", device="1") == 1
    first_is_gone = cards(24, 12, order=(1,))
    node.become(first_is_gone)
    until(lambda: [row["device"] for row in node.devices()["devices"]] == ["0", gpu_uuid(0)], "the other to have its index")
    assert (
        node.metric("device_quarantined", device=gpu_uuid(0)) == 1 and node.metric("device_quarantined", device="0") is not None
    )
    assert gpu_uuid(0) in node.command("devices").stdout


def test_a_gpu_that_cannot_be_read_shows_nothing_as_if_it_were_measured(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(TWO, "engines vram=1GiB", pools=[fake("a", devices=[1], gib=2)]).start()
    node.until_ready("a")
    node.become(TWO, "fault gpu=1 error=15")
    node.until_device(lambda row: row["state"] == "quarantined", "the quarantine", "1")
    until(lambda: not node.status("a")["live"], "its engine to end")
    row = node.device("1")
    unknown = ("vram_free_bytes", "vram_used_bytes", "temperature_c", "power_watts", "utilization_percent")
    assert row["readable"] is False and [row[name] for name in unknown] == [None] * len(unknown)
    assert node.metric("vram_free_bytes", device="1") is None and node.metric("pool_vram_free_bytes", pool_id="a") is None
    lines = node.command("devices").stdout.splitlines()
    assert lines[-1].endswith("of 12,288 MiB: the device cannot be read") and f"  {gpu_uuid(1)} at 00000000:02:00.0" in lines
    explained = node.command("explain", "a").stdout
    assert explained.splitlines()[0].startswith("Pool 'a' would not start: ") and "hint: reboot the machine" in explained


def test_nothing_is_left_after_sigterm_but_the_built_driver(make_node: MakeNode, real: MakePool) -> None:
    node = make_node(TWO, "engines vram=rss", pools=[real("a", devices=[0]), real("b", devices=[1])], kmsg=True).start()
    node.until_ready("a", "b")
    everybody = [node.status(name)["pid"] for name in "ab"] + children(node.pid)
    assert len(node.workers()) == 1
    assert node.terminate() == 0
    until(lambda: not any(alive(pid) for pid in everybody), "everything to end")
    assert mentioning(node.folder) == [] == left_behind(node.folder)
    kept = {path.relative_to(node.state).parts[0] for path in node.state.iterdir()}
    known = {"daemon.lock", "control.token", "state.generation"}
    assert all(name.startswith(("simulated-nvml-", "state.db", "journal.", "leases.db")) or name in known for name in kept), kept
