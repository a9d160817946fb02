"""Pools whose model comes over a network that fails: what their status and operations say, and that one download is for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.hub_app import status
from tests.models.hub_beside import HubBeside
from tests.system.daemons import Daemon

REF = "hf:org/repo/m.gguf"
POLICY = 'policy: {allow_network: true, allow_schemes: [file, hf, http], allow_domains: ["127.0.0.1"]}\n'


@pytest.fixture
def beside(tiny_model: Path) -> Iterator[HubBeside]:
    made = HubBeside(files={"m.gguf": tiny_model.read_bytes()})
    yield made
    made.end()


@pytest.fixture
def node(open_dir: Path, beside: HubBeside) -> Iterator[Daemon]:
    pools = [
        {
            "id": name, "engine": "llamacpp", "model": REF, "ctx": 128, "slots": 1, "preload": False,
            "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
        }
        for name in ("one", "two")
    ]  # fmt: skip
    made = Daemon(
        open_dir / "node", f"{POLICY}models: {{keep_free_bytes: 0}}\npools: {json.dumps(pools)}\n", HF_ENDPOINT=beside.hub.url
    )
    yield made
    made.end()


def contents(beside: HubBeside) -> list[int]:
    """Where each request for the file itself began."""
    return [int((asked.range or "bytes=0-")[6:-1]) for asked in beside.hub.asked if "/resolve/" in asked.path]


def test_a_pool_says_why_its_model_does_not_come_and_two_that_want_one_share_what_does(node: Daemon, beside: HubBeside) -> None:
    hub = beside.hub
    node.start()
    right, hub.digests["m.gguf"] = dict(hub.digests), "0" * 64
    code, answer = node.post("/v1/pools/one/start?wait=true")
    assert code >= 400 and answer["code"] == "DIGEST_MISMATCH", answer
    assert "digest mismatch" in node.status("one")["last_error"]
    assert len(contents(beside)) == 2, "it was fetched once more as a whole"
    hub.digests, hub.asked = right, []
    hub.script = [status(404)]
    code, answer = node.post("/v1/models/pull?wait=true", {"ref": REF})
    assert code == 422 and "answers 404" in str(answer), answer
    hub.script, hub.asked = [hub.cut_after(200_000), hub.cut_after(100_000)], []
    assert node.post("/v1/pools/one/start")[0] == node.post("/v1/pools/two/start")[0] == 202
    for name in ("one", "two"):
        node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", name, 60)
    starts = contents(beside)
    assert starts[0] == 0 and starts == sorted(set(starts)) and len(starts) == 3, "each byte came once, for both"
    assert node.status("one")["model_path"] == node.status("two")["model_path"]
    assert list((node.folder / "state-models" / "partial").iterdir()) == []
