"""Reloads while the old engine sleeps, and pools that sleep to make room for each other.

A real daemon on a simulated GPU, which shows the memory that processes really have.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.failpoints import FLAG, WANTED
from pool_managerd.testing import sleepy_engine
from tests.conftest import free_port
from tests.gpu.conftest import MakeNode
from tests.gpu.nodes import GpuNode, Json, pool
from tests.host.simulated import NONE, gpu_uuid
from tests.system.nodes import alive, left_behind, mentioning

SMALL = NONE + f'gpu 0 uuid={gpu_uuid(0)} name="NVIDIA Small" pci=0000:01:00.0 cc=8.6 vram=1GiB\n'
RULES = "reload: {bake_ms: 300}\n"
STEPS = (
    "reload.draining",
    "reload.asleep",
    "reload.loading",
    "reload.loaded",
    "reload.committed",
    "reload.taken_over",
    "reload.undoing",
)
TELLING = ("reload.loaded", "reload.undoing")


def sleepy(*script: str, model: str = "old") -> Json:
    """The scripted engine as a PreparedEngine's JSON: two of it do not fit."""
    port = free_port()
    flags = ["-I", sleepy_engine.__file__, "--port", str(port), "--model", model, "--gpu-memory-utilization", "0.6"]
    given = ["--enable-sleep-mode", "--weights-mib", "450", *script]
    return {"binary_path": sys.executable, "engine": "vllm", "flags": [*flags, *given], "port": port, "device_mask": "0"}


def broken() -> Json:
    """One that needs as much, and ends at once."""
    return {**sleepy(), "flags": ["-c", "raise SystemExit(3)", "--gpu-memory-utilization", "0.6"]}


@pytest.fixture
def node(make_node: MakeNode) -> GpuNode:
    made = make_node(SMALL, "engines vram=rss", pools=[])
    made.config.write_text(made.config.read_text() + RULES)
    return made


def runs(node: GpuNode) -> str:
    argv = Path(f"/proc/{node.status()['pid']}/cmdline").read_bytes().split(b"\0")
    return argv[argv.index(b"--model") + 1].decode()


def reload(node: GpuNode, new: Json, **asked: Any) -> tuple[int, Json]:
    code, told = node.post("/v1/pools/p/reload?wait=true", {"engine": new, **asked})
    return code, dict(told)


def begun(node: GpuNode, *script: str) -> Json:
    code, told = node.start().post("/v1/pools/p/preload", sleepy(*script))
    assert code == 200, told
    return node.status()


def test_the_old_engine_sleeps_and_ends_when_the_new_one_stays(node: GpuNode) -> None:
    before = begun(node)
    plan = node.post("/v1/pools/p/reload?dry_run=true", {"engine": sleepy(model="new")})[1]
    assert plan["strategy"] == "sleep_old", plan
    code, done = reload(node, sleepy(model="new"))
    assert code == 200 and done["outcome"]["strategy"] == "sleep_old", done
    node.until(lambda status: bool(status["ready"] and not status["beside"]), "the old engine to end")
    assert runs(node) == "new" and not alive(before["pid"]) and node.status()["crash_count"] == 0
    assert [line["duration_ms"] >= 0 for line in node.lines("asleep")] == [True]
    plan = node.post("/v1/pools/p/reload?dry_run=true", {"engine": sleepy(model="third")})[1]
    assert plan["forecast_downtime_ms"] is not None, "it was measured"


def test_it_wakes_where_the_new_one_does_not_come_up(node: GpuNode) -> None:
    before = begun(node)
    code, failed = reload(node, broken())
    assert code == 500 and failed["message"].endswith("what ran before is awake and serves again"), failed
    status = node.status()
    assert status["ready"] and status["pid"] == before["pid"] and status["crash_count"] == 0 and status["beside"] is None


def test_sleep_that_frees_nothing_is_found_out_and_not_tried_again(node: GpuNode) -> None:
    before = begun(node, "--sleeps", "holding")
    code, failed = reload(node, sleepy(model="new"))
    assert code == 503 and "does not free the memory that the new one needs" in failed["message"], failed
    assert node.status()["pid"] == before["pid"] and node.status()["ready"]
    code, done = reload(node, sleepy(model="new"))
    assert code == 200 and done["outcome"]["strategy"] == "stop_start" and runs(node) == "new"


def test_pools_that_can_sleep_take_turns_without_being_loaded_again(node: GpuNode) -> None:
    taking_turns(node.start(), "a", "b")
    first = acquired(node, "a")
    assert node.status("b")["state"] == "sleeping" and node.status("b")["desired"] == "evicted"
    second = acquired(node, "b")
    assert node.status("a")["state"] == "sleeping" and alive(first["pid"])
    node.kill()
    node.start()
    node.until(lambda status: bool(status["ready"]), "b to serve on", pool="b")
    node.until(lambda status: status["state"] == "offline", "the sleeper to be ended by the next daemon", pool="a")
    assert node.status("b")["pid"] == second["pid"] and not alive(first["pid"])
    assert acquired(node, "a")["pid"] != first["pid"] and node.status("b")["state"] == "sleeping"
    assert node.status("a")["crash_count"] == node.status("b")["crash_count"] == 0


def test_a_sleeper_that_frees_nothing_is_stopped_after_all(node: GpuNode) -> None:
    taking_turns(node.start(), "a", "b", "--sleeps", "holding")
    acquired(node, "a")
    assert node.status("b")["state"] == "offline"


def test_pools_that_take_turns_are_applied_as_any_others(node: GpuNode, open_dir: Path) -> None:
    before = node.config.read_text()
    binary, model = as_vllm(open_dir), made_model(open_dir)

    def configured(slots: int) -> None:
        keys = {"engine": "vllm", "slots": slots, "gib": 0.6, "preload": False, "devices": [0], "ctx": 512}
        pools = [pool(name, model, binary, **keys, provisioning={"flags": ["--enable-sleep-mode"]}) for name in "ab"]
        node.config.write_text(before.replace("pools: []", f"pools: {json.dumps(pools)}"))

    configured(2)
    node.start()
    acquired(node, "a")
    acquired(node, "b")
    assert node.status("a")["state"] == "sleeping"
    configured(3)
    code, told = node.post("/v1/apply?wait=true", {})
    assert code == 200, told
    assert acquired(node, "a")["slots_total"] == acquired(node, "b")["slots_total"] == 3
    assert node.status("a")["state"] == "sleeping" and node.status("a")["unapplied"] is None


def as_vllm(folder: Path) -> Path:
    """The scripted engine as a binary that takes what vLLM does."""
    binary = folder / "vllm"
    script = f'exec "{sys.executable}" -I "{sleepy_engine.__file__}" --weights-mib 450 "$@"'
    binary.write_text(f'#!/bin/sh\ncase "$1" in --help|--version) exit 1;; esac\n{script}\n')
    binary.chmod(0o755)
    return binary


def made_model(folder: Path) -> Path:
    """As much of a model as is read before it is launched."""
    model = folder / "model"
    model.mkdir()
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 512,
    }
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape}))
    (model / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return model


def taking_turns(node: GpuNode, first: str, second: str, *script: str) -> None:
    """Both have been there; ``second`` is ready."""
    for name in (first, second):
        code, told = node.post(f"/v1/pools/{name}/preload", sleepy(*script))
        assert code == 200, told
        if name == first:
            node.post(f"/v1/pools/{name}/evict?wait=true")


def acquired(node: GpuNode, name: str) -> Json:
    """The pool's status once it had a slot."""
    code, lease = node.post("/v1/acquire", {"model": name, "wait_ms": 20_000})
    assert code == 201, lease
    node.delete(f"/v1/pools/{name}/leases/{lease['lease_id']}")
    return node.status(name)


@pytest.mark.parametrize("how", ["never", "dying"])
def test_an_engine_that_does_not_fall_asleep_serves_on_or_again(node: GpuNode, how: str) -> None:
    begun(node, "--sleeps", how)
    code, failed = reload(node, sleepy(model="new"))
    assert code == 503 and failed["message"].startswith("reload failed"), failed
    node.until(lambda status: bool(status["ready"]), "it to serve")
    assert runs(node) == "old" and node.status()["crash_count"] == (how == "dying")


def test_an_engine_that_does_not_wake_is_started_again(node: GpuNode) -> None:
    before = begun(node, "--wakes", "never")
    code, failed = reload(node, broken())
    assert code == 500 and failed["details"]["rolled_back"] is False, failed
    node.until(lambda status: bool(status["ready"]), "it to serve again")
    assert runs(node) == "old" and node.status()["pid"] != before["pid"]


def test_without_its_routes_it_is_not_put_to_sleep_and_it_is_said_what_it_lacks(node: GpuNode) -> None:
    begun(node, "--dev-routes", "missing")
    code, refused = reload(node, sleepy(model="new"), strategy="sleep_old")
    assert code == 409 and "VLLM_SERVER_DEV_MODE=1" in refused["message"], refused
    code, done = reload(node, sleepy(model="new"))
    assert code == 200 and done["outcome"]["strategy"] == "stop_start"


@pytest.mark.parametrize("step", [pytest.param(step, marks=() if step in TELLING else pytest.mark.slow) for step in STEPS])
def test_a_daemon_that_dies_meanwhile_is_followed_by_one_that_wakes_it_or_ends_it(node: GpuNode, step: str) -> None:
    node.env |= {FLAG: "1", WANTED: f"{step}=panic"}
    before = begun(node)
    new = broken() if step == "reload.undoing" else sleepy(model="new")
    with suppress(OSError):
        node.post("/v1/pools/p/reload", {"engine": new})
    assert node.process is not None
    assert node.process.wait(20) == -9, "it died there"
    node.env = {}
    node.start()
    node.until(lambda status: bool(status["ready"] and not status["beside"]), "one of the two to serve")
    done = step in ("reload.committed", "reload.taken_over")
    assert runs(node) == ("new" if done else "old") and (node.status()["pid"] == before["pid"]) is not done
    assert alive(before["pid"]) is not done
    code, again = reload(node, sleepy(model="third"))
    assert code == 200 and runs(node) == "third", again
    node.terminate()
    assert left_behind(node.folder) == [] and mentioning(node.folder) == []


def test_a_real_llama_server_falls_asleep_by_itself_and_wakes(make_node: MakeNode, llama_server: Path, smol_model: Path) -> None:
    """It gives back what it had read of its model, as its own memory shows; what wakes it is a request."""
    flags = ["--threads", "1", "--sleep-idle-seconds", "1"]
    one = pool("p", smol_model, llama_server, vram_bytes=600 << 20, slots=1, devices=[0], provisioning={"flags": flags})
    node = make_node(SMALL, "engines vram=rss", pools=[one])
    node.config.write_text(node.config.read_text() + RULES)
    node.start()
    node.until_ready("p")
    before = node.status()
    asked = {"changes": {"ctx": 512}, "strategy": "sleep_old"}
    wrong = {**asked, "changes": {"provisioning": {"flags": [*flags, "--no-such-flag"]}}}
    assert node.post("/v1/pools/p/reload?wait=true", wrong)[0] == 400, "what is known to be wrong puts nobody to sleep"
    code, done = node.post("/v1/pools/p/reload?wait=true", asked)
    assert code == 200 and done["outcome"]["strategy"] == "sleep_old", done
    node.until(lambda status: bool(status["ready"] and not status["beside"]), "the old engine to end")
    assert node.status()["pid"] != before["pid"] and not alive(before["pid"])
    before = node.status()
    strict = {"smoke_prompt": "2 + 2 =", "smoke_expect": "no such word"}
    code, failed = node.post("/v1/pools/p/reload?wait=true", {**asked, "changes": {"ctx": 256, "reload": strict}})
    assert code == 500 and failed["message"].endswith("what ran before is awake and serves again"), failed
    assert node.status()["ready"] and node.status()["pid"] == before["pid"]
    log = node.get("/v1/pools/p/logs")[1]
    assert "exiting sleeping state" in str(log)
