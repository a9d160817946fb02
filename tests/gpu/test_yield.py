"""The GPU is a person's when they want it: real daemons, simulated GPUs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import cards, until


def test_a_gpu_is_yielded_over_a_restart_of_the_daemon_and_taken_back(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(cards(24), "engines vram=1GiB", pools=[fake("chat", gib=2), fake("code", gib=2, preload=False)]).start()
    node.until_ready("chat")
    node.post("/v1/pools/code/start?wait=true")
    lease = node.post("/v1/pools/code/leases")[1]["lease_id"]
    done = node.command("yield", "--for", "2h")
    assert done.returncode == 0 and "code (ready, 1 in flight)" in done.stdout, done
    until(lambda: node.status("chat")["state"] == "offline", "the idle one to go")
    assert node.status("code")["ready"], "nothing in flight is cut off"
    node.kill()
    node.start()
    node.until_ready("code")
    assert "code (ready, 1 in flight)" in node.command("yield", "--show").stdout
    assert node.delete(f"/v1/pools/code/leases/{lease}")[0] == 200
    until(lambda: node.status("code")["state"] == "offline", "the other one to go")
    status, told = node.post("/v1/acquire", {"model": "code", "wait_ms": 5000})
    assert status == 503 and told["code"] == "GPU_YIELDED" and "yielded until" in told["message"]
    assert node.device("0")["vram_available_bytes"] == 0
    assert node.command("yield", "--end").stdout.strip() == "no GPU is left to others"
    node.until_ready("chat")
    status, told = node.post("/v1/acquire", {"model": "code", "wait_ms": 20_000})
    assert status == 201, told


def test_wait_returns_when_nobody_is_left_and_a_named_program_has_its_gpu(make_node: MakeNode, fake: MakePool) -> None:
    game, name = f"process gpu=0 pid={os.getpid()} vram=1GiB", Path("/proc/self/comm").read_text().strip()
    node = make_node(cards(24), "engines vram=1GiB", pools=[fake("chat", gib=2)], gpu={"yield_to": [name]}).start()
    node.until_ready("chat")
    done = node.command("yield", "--gpu", "0", "--wait")
    assert done.returncode == 0 and "nobody" in done.stdout and node.status("chat")["state"] == "offline", done
    assert node.command("yield", "--end").returncode == 0
    node.until_ready("chat")
    node.become(cards(24), game)
    until(lambda: node.status("chat")["state"] == "offline", "it to go for the game", 30)
    assert any(f"{name} runs there" in line["human"] for line in node.lines("evicted"))
    node.become(cards(24))
    node.until_ready("chat")


def test_what_is_no_gpu_and_no_time_is_refused(make_node: MakeNode, fake: MakePool) -> None:
    node = make_node(cards(24), pools=[fake("chat", gib=2, preload=False)]).start()
    for arguments, said in (
        (("--gpu", "7"), "device 7 not found"), (("--for", "soon"), "--for"), (("--end", "--for", "2h"), "at once"),
    ):  # fmt: skip
        done = node.command("yield", *arguments)
        assert done.returncode in (2, 4) and said in done.stderr, done
    assert node.post("/v1/yield", {"for_ms": 5})[0] == 400
