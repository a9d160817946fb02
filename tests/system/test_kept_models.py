"""A cache of models kept within its limits by a real daemon with a real engine: what goes, what stays, and who is told."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.system.daemons import Daemon
from tests.system.test_fetched_models import NAME, POLICY, REF, TOKEN, HubThread, cli

OLD, OLDER = "hf:org/smol:Q8_0", "hf:org/smol:Q2_K"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[HubThread]:
    made = HubThread(tiny_model.read_bytes())
    for number, quantisation in enumerate(("Q8_0", "Q2_K", "Q3_K")):
        made.hub.files[f"other-{quantisation}.gguf"] = tiny_model.read_bytes() + bytes(number + 1)
    yield made
    made.end()


@pytest.fixture
def node(open_dir: Path, hub: HubThread, tiny_model: Path) -> Iterator[Daemon]:
    pool = {
        "id": "tiny", "engine": "llamacpp", "model": REF, "ctx": 256, "slots": 1, "preload": True,
        "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    room = 3 * tiny_model.stat().st_size + 1000
    made = Daemon(
        open_dir / "node", f"{POLICY}models: {{keep_free_bytes: 0, max_bytes: {room}}}\npools: {json.dumps([pool])}\n",
        HF_ENDPOINT=hub.hub.url, HF_TOKEN=TOKEN,
    )  # fmt: skip
    yield made
    made.end()


def refs(node: Daemon) -> list[str]:
    return [row["ref"] for row in node.get("/v1/models")[1]]


def gauge(node: Daemon, name: str) -> float:
    lines = str(node.get("/metrics")[1]).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0] == name)


def on_a_terminal(node: Daemon, *words: str) -> list[str]:
    """What is shown on one of 80 columns."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = [sys.executable, "-m", "pool_managerd.cli", *words, "--url", f"http://127.0.0.1:{node.port}"]
    env = {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, "NO_COLOR": "1", "TERM": "dumb"}
    process = subprocess.Popen(argv, stdin=side, stdout=side, stderr=side, env=env, cwd=node.folder)
    os.close(side)
    shown = b""
    try:
        while more := os.read(main, 65_536):
            shown += more
    except OSError:  # nobody writes any more
        pass
    assert process.wait(30) == 0, shown
    os.close(main)
    return shown.decode().replace("\r", "").splitlines()


@pytest.mark.slow
def test_a_cache_stays_within_its_limits_and_nothing_goes_that_anybody_needs(node: Daemon, hub: HubThread) -> None:
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "tiny", 60)
    for ref in (OLDER, OLD):
        assert cli(node, "models", "pull", ref).returncode == 0
    refused = cli(node, "models", "pull", "hf:org/smol:Q3_K")
    assert refused.returncode == 1 and "models.max_bytes" in refused.stderr, refused
    assert not [asked for asked in hub.hub.asked if "Q3_K" in asked.path], "not a byte of it was asked for"

    shown = on_a_terminal(node, "models", "gc", "--dry-run", "--older-than", "0s")
    assert all(len(line) <= 80 for line in shown), shown
    assert [line.split()[:2] for line in shown if OLD in line or OLDER in line] == [["delete", OLDER], ["delete", OLD]], shown
    assert any("pool tiny is" in line for line in shown), shown
    planned = json.loads(cli(node, "models", "gc", "--dry-run", "-o", "json").stdout)
    assert {row["action"] for row in planned["rows"]} == {"keep"} and planned["freed_bytes"] == 0
    assert refs(node) == sorted([REF, OLD, OLDER])

    assert "is pinned: it stays" in cli(node, "models", "pin", OLDER).stdout
    assert "(pinned)" in cli(node, "models", "ls").stdout
    pinned = cli(node, "models", "rm", OLDER)
    assert pinned.returncode == 4 and "it is pinned" in pinned.stderr and "models unpin" in pinned.stderr
    assert "a pool needs it" not in cli(node, "models", "gc", "--older-than", "0s").stdout
    assert refs(node) == sorted([REF, OLDER])
    node.kill()
    node.start()
    assert refs(node) == sorted([REF, OLDER]) and {r["pinned"] for r in node.get("/v1/models")[1] if r["ref"] == OLDER} == {True}
    node.until(lambda pool: bool(pool["ready"]), "the engine to be adopted", "tiny", 60)
    used = next(row for row in node.get("/v1/models")[1] if row["ref"] == REF)
    assert used["last_used_ms"] and used["lifecycle"] == "active" and used["pools"] == ["tiny"]
    assert cli(node, "models", "unpin", OLDER).returncode == 0
    wait_until(lambda: gauge(node, 'catalog_entries_total{state="active"}') == 2, "the cache to be counted")
    assert gauge(node, "model_cache_bytes") == sum(row["size_bytes"] for row in node.get("/v1/models")[1])
    missing = cli(node, "models", "pin", OLD)
    assert missing.returncode == 4 and "is not in the cache" in missing.stderr
    wrong = cli(node, "models", "gc", "--older-than", "soon")
    assert wrong.returncode == 2 and "it is no length of time" in wrong.stderr
    told: list[dict[str, Any]] = [
        json.loads(line) for line in (node.folder / "state-models/catalog/provenance.jsonl").read_text().splitlines()
    ]
    assert [one["ref"] for one in told] == [REF, OLDER, OLD] and TOKEN not in json.dumps(told)
    assert told[0]["path"].endswith(NAME) and told[0]["revision"]


def test_what_is_to_come_has_room_made_for_it_where_that_is_allowed(node: Daemon, hub: HubThread) -> None:
    node.config.write_text(
        node.config.read_text().replace("{keep_free_bytes: 0,", "{gc: {enabled: true, keep_days: 0}, keep_free_bytes: 0,")
    )
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "tiny", 60)
    for ref in (OLDER, OLD):
        assert node.post("/v1/models/pull?wait=true", {"ref": ref})[0] == 200
    code, answer = node.post("/v1/models/pull?wait=true", {"ref": "hf:org/smol:Q3_K"})
    assert code == 200, answer
    assert refs(node) == sorted([REF, OLD, "hf:org/smol:Q3_K"]), "the one that nobody had needed for longest is gone"
    (event,) = node.lines("models_gc")
    assert event["deleted"] == [OLDER] and "freed" in event["human"]
    assert node.status("tiny")["ready"] and Path(node.status("tiny")["model_path"]).exists()


@pytest.mark.slow
def test_a_strict_daemon_says_before_a_start_what_it_will_not_run(node: Daemon, hub: HubThread, tiny_model: Path) -> None:
    text = node.config.read_text().replace("allow_network: true", "strict_verification: true, allow_network: true")
    node.config.write_text(text.replace(REF, f"file:{tiny_model}").replace('"preload": true', '"preload": false'))
    node.start()
    code, found = node.get("/v1/pools/tiny/explain")
    assert code == 200 and "policy.strict_verification" in json.dumps(found), found
    code, answer = node.post("/v1/pools/tiny/start?wait=true")
    assert code >= 400 and "nobody has said what it has to be" in json.dumps(answer), answer
