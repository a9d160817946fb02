"""A pool whose model is a name on a hub: fetched, verified and run by a real engine, whatever happens to the daemon meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import wait_until
from tests.models.hub_app import Hub, first_byte
from tests.system.daemons import Daemon

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
REF = f"hf:org/smol/{NAME}"
POLICY = 'policy: {allow_network: true, allow_schemes: [file, hf, http], allow_domains: ["127.0.0.1"]}\n'
TOKEN = "hf_a_token_of_the_hub"


class HubThread:
    """A hub beside the test: ``gate`` holds content back after ``held`` bytes of an answer, until it is set."""

    def __init__(self, content: bytes) -> None:
        self.hub = Hub(repository="org/smol", files={NAME: content}, token=TOKEN)
        self.held, self.gate = 0, threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self.hub.start())

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def hold(self, count: int, times: int = 1) -> None:
        self.held = count
        self.hub.script = [self._holding] * times

    async def _holding(self, request: web.Request) -> web.StreamResponse:
        body = (self.hub.content(request.match_info["path"]) or b"")[first_byte(request) :]
        response = await self.hub.begun(request, len(body))
        await response.write(body[: self.held])
        while not self.gate.is_set():
            await asyncio.sleep(0.02)
        await response.write(body[self.held :])
        return response

    def starts(self) -> list[int]:
        """The first bytes that were asked for."""
        return [int((asked.range or "bytes=0-")[6:-1]) for asked in self.hub.asked if "/resolve/" in asked.path]

    def end(self) -> None:
        self.gate.set()
        self._call(self.hub.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def hub(smol_model: Path) -> Iterator[HubThread]:
    made = HubThread(smol_model.read_bytes())
    yield made
    made.end()


@pytest.fixture
def node(open_dir: Path, hub: HubThread) -> Iterator[Daemon]:
    pool = {
        "id": "smol", "engine": "llamacpp", "model": REF, "ctx": 512, "slots": 1, "preload": True,
        "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    made = Daemon(
        open_dir / "node", f"{POLICY}models: {{keep_free_bytes: 0}}\npools: {json.dumps([pool])}\n", HF_ENDPOINT=hub.hub.url,
        HF_TOKEN=TOKEN,
    )  # fmt: skip
    yield made
    made.end()


def test_a_model_is_fetched_by_its_name_and_a_daemon_that_is_killed_meanwhile_loses_nothing(
    node: Daemon, hub: HubThread, smol_model: Path
) -> None:
    hub.hold(40_000_000)
    node.start()
    node.until(lambda pool: ((pool["preload"] or {}).get("bytes_done") or 0) > 10_000_000, "some of it to be there", "smol")
    loading = node.status("smol")
    assert loading["state"] == "provisioning" and loading["preload"]["human"] == "Fetching the model"
    assert loading["preload"]["bytes_total"] == smol_model.stat().st_size
    assert "its model is fetched first" in str(node.get("/v1/pools/smol/explain")[1])
    assert " of 93.8 MiB" in cli(node, "status", "smol").stdout
    node.kill()
    hub.gate.set()
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "smol", 60)
    found = node.status("smol")
    assert found["model_id"] == REF and Path(found["model_path"]).is_relative_to(node.folder / "state-models")
    assert hashlib.sha256(Path(found["model_path"]).read_bytes()).digest() == hashlib.sha256(smol_model.read_bytes()).digest()
    first, second = hub.starts()
    assert first == 0 and second > 10_000_000
    fetched = node.lines("fetch")
    assert "Fetching the model of pool 'smol'" in fetched[0]["human"] and {"bytes_done", "bytes_total"} <= fetched[0].keys()
    assert TOKEN not in node.text()
    node.terminate()
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready again", "smol", 60)
    assert len(hub.starts()) == 2, "what is there is not fetched again"


def test_a_stop_ends_a_download_and_a_start_goes_on_with_it(node: Daemon, hub: HubThread) -> None:
    hub.hold(40_000_000)
    node.start()
    node.until(lambda pool: ((pool["preload"] or {}).get("bytes_done") or 0) > 10_000_000, "some of it to be there", "smol")
    assert node.post("/v1/pools/smol/stop?wait=true")[0] == 200
    assert node.status("smol")["state"] == "offline" or node.status("smol")["phase"] == "down"
    hub.gate.set()
    assert node.post("/v1/pools/smol/start?wait=true")[0] == 200
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "smol", 60)
    assert hub.starts()[-1] > 10_000_000


def test_what_the_policy_does_not_allow_is_not_fetched(node: Daemon, hub: HubThread) -> None:
    node.config.write_text(node.config.read_text().replace("allow_network: true", "allow_network: false"))
    node.start()
    node.until(lambda pool: bool(pool["last_error"]), "the refusal", "smol")
    assert "policy: the network may not be used" in node.status("smol")["last_error"]
    assert hub.hub.asked == []


def cli(node: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pool_managerd.cli", *words, "--url", f"http://127.0.0.1:{node.port}"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=node.folder)


def test_models_are_fetched_listed_verified_and_removed_by_hand(node: Daemon, hub: HubThread) -> None:
    node.config.write_text(node.config.read_text().replace('"preload": true', '"preload": false'))
    hub.hub.files["other-Q8_0.gguf"] = b"GGUF\x03\x00\x00\x00other"
    node.start()
    assert "no models in the cache" in cli(node, "models", "ls").stdout
    planned = cli(node, "models", "pull", REF, "--dry-run")
    assert planned.returncode == 0 and f"{REF} would be fetched: 93.8 MiB" in planned.stdout, planned
    assert hub.starts() == []
    pulled = cli(node, "models", "pull", REF)
    assert pulled.returncode == 0 and f"{REF} is there (93.8 MiB, verified)" in pulled.stdout, pulled
    assert f"fetching 93.8 MiB: {NAME}" in pulled.stderr
    assert cli(node, "models", "pull", "hf:org/smol:Q8_0").returncode == 0
    listed = json.loads(cli(node, "models", "ls", "-o", "json").stdout)
    assert [(row["ref"], row["pools"], row["verified"]) for row in listed] == [
        ("hf:org/smol/" + NAME, ["smol"], True), ("hf:org/smol:Q8_0", [], True),
    ]  # fmt: skip
    assert "POOLS" in cli(node, "models", "ls").stdout
    refused = cli(node, "models", "rm", REF)
    assert refused.returncode == 4 and "pool smol is configured with it" in refused.stderr, refused
    assert cli(node, "models", "verify").returncode == 0
    other = Path(listed[1]["path"])
    other.chmod(0o644)
    other.write_bytes(b"GGUF\x03\x00\x00\x00wrong")
    found = cli(node, "models", "verify", "hf:org/smol:Q8_0")
    assert found.returncode == 1 and "changed: hf/org/smol" in found.stdout
    removed = cli(node, "models", "rm", "hf:org/smol:Q8_0")
    assert removed.returncode == 0 and "is removed: 13 B freed" in removed.stdout, removed
    assert not other.exists() and Path(listed[0]["path"]).exists()
    missing = cli(node, "models", "rm", "hf:org/smol:Q8_0")
    assert missing.returncode == 4 and "is not in the cache" in missing.stderr
    assert cli(node, "models", "pull", "file:x.gguf").returncode == 4
    wrong = cli(node, "models", "pull", "hf:org/smol:Q2_K")
    assert wrong.returncode == 4 and "it has: " in wrong.stderr, wrong


def test_a_download_for_nobody_is_broken_off_with_the_daemon_and_can_go_on(node: Daemon, hub: HubThread) -> None:
    node.config.write_text(node.config.read_text().replace('"preload": true', '"preload": false'))
    hub.hold(40_000_000)
    node.start()
    code, begun = node.post("/v1/models/pull", {"ref": REF})
    assert code == 202
    place = f"/v1/operations/{begun['operation_id']}"
    wait_until(lambda: (node.get(place)[1]["progress"] or {}).get("done", 0) > 10_000_000, "some of it to be there")
    assert node.post("/v1/models/remove", {"ref": REF})[0] == 404
    assert node.post("/v1/models/pull", {"ref": REF})[0] == 202, "it joins"
    assert node.terminate() == 0
    hub.gate.set()
    node.start()
    code, ended = node.post("/v1/models/pull?wait=true", {"ref": REF})
    assert code == 200 and ended["outcome"]["verified"] and hub.starts()[-1] > 10_000_000


def test_who_asks_for_a_model_that_is_not_here_gets_it_and_a_reload_fetches_before_it_touches_anything(
    node: Daemon, hub: HubThread
) -> None:
    node.config.write_text(node.config.read_text().replace('"preload": true', '"preload": false'))
    node.start()
    told = node.get("/v1/pools/smol/explain")[1]
    assert "its model is fetched first: 93.8 MiB; it is llama, Q4_1, trained for 8192 tokens" in str(told["steps"]), told
    assert "memory" in [step["kind"] for step in told["steps"]] and not told["blockers"]
    assert hub.starts() == [] and 0 < hub.hub.served <= 2_000_000, "no more than its header"
    code, plan = node.post("/v1/acquire?dry_run=true", {"model": "smol"})
    assert code == 200, plan
    code, lease = node.post("/v1/acquire", {"model": "smol", "wait_ms": 60_000})
    assert code == 201 and lease["url"], lease
    assert node.delete(f"/v1/pools/smol/leases/{lease['lease_id']}")[0] == 200
    hub.hub.files["other.gguf"] = b"not a model at all, whatever it is called"
    code, answer = node.post("/v1/pools/smol/reload?wait=true", {"new_model_ref": "hf:org/smol/other.gguf"})
    assert code >= 400 and "begins with" in str(answer), answer
    assert node.status("smol")["ready"] and node.status("smol")["model_id"] == REF
    code, answer = node.post("/v1/pools/smol/reload?wait=true", {"new_model_ref": "hf:org/smol:Q4_1"})
    assert code == 200 and answer["outcome"]["model_id"] == "hf:org/smol:Q4_1", answer
    assert len([start for start in hub.starts() if start == 0]) == 1, (
        "two names of one file are one download, and what is no model is none"
    )
