"""Models that other tools have on this machine, and files of one's own: run by a real engine, with the network off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.other_tools import ollama, sha256
from tests.system.daemons import Daemon
from tests.system.test_fetched_models import NAME, cli

COMMIT = "ba5eba11" * 5
SMOL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REF = f"hf:org/smol/{NAME}"


@pytest.fixture
def hub_cache(open_dir: Path, smol_model: Path) -> Path:
    """As the hub's own tools leave it."""
    folder = open_dir / "hub/models--org--smol"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    shutil.copyfile(smol_model, folder / "blobs" / SMOL_SHA256)
    (folder / f"snapshots/{COMMIT}/{NAME}").symlink_to(f"../../blobs/{SMOL_SHA256}")
    return open_dir / "hub"


@pytest.fixture
def node(open_dir: Path, hub_cache: Path) -> Iterator[Daemon]:
    keys = {
        "engine": "llamacpp", "ctx": 512, "slots": 1, "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    models = {"smol": REF, "whale": "ollama:tiny", "own": "local:mine"}
    pools = [keys | {"id": name, "model": model, "preload": name == "smol"} for name, model in models.items()]
    policy = "policy: {allow_network: false, allow_schemes: [file, hf]}\nmodels: {keep_free_bytes: 0}\n"
    made = Daemon(
        open_dir / "node", f"{policy}pools: {json.dumps(pools)}\n",
        HF_HUB_CACHE=str(hub_cache), OLLAMA_MODELS=str(open_dir / "ollama"),
    )  # fmt: skip
    yield made
    made.end()


def test_a_real_engine_runs_what_the_hubs_cache_has_and_what_ollama_has_and_what_was_imported(
    node: Daemon, hub_cache: Path, open_dir: Path, tiny_model: Path
) -> None:
    path = hub_cache / f"models--org--smol/snapshots/{COMMIT}/{NAME}"
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "smol", 60)
    found = node.status("smol")
    assert (found["model_id"], found["model_path"]) == (REF, str(path))
    assert any(f"{REF} is used where huggingface has it: {hub_cache}" in line["human"] for line in node.lines("notice"))
    assert all("Verifying the model of pool" in line["human"] for line in node.lines("fetch")), "nothing was fetched"
    assert not any("unverified" in line["human"] for line in node.lines("notice"))

    pulled = cli(node, "models", "pull", REF)
    assert f"{REF} is there (93.8 MiB, verified, as huggingface has it)" in pulled.stdout, pulled
    assert node.get("/v1/models") == (200, [])
    body = tiny_model.read_bytes()
    ollama(open_dir / "ollama", body)
    rows = node.get("/v1/models?all=true")[1]
    assert [(row["ref"], row["tool"], row["verified"], row["pools"]) for row in rows] == [
        (REF, "huggingface", True, ["smol"]), ("ollama:tiny:latest", "ollama", False, ["whale"]),
    ]  # fmt: skip
    imported = cli(node, "models", "import", str(tiny_model), "--as", "mine", "--sha256", sha256(body))
    assert imported.returncode == 0 and "local:mine is in the cache (" in imported.stdout, imported
    assert f"sha256:{sha256(body)}" in imported.stdout
    refused = cli(node, "models", "import", "/etc/hostname")
    assert refused.returncode == 1 and "it is no GGUF model" in refused.stderr, refused
    lines = cli(node, "models", "ls", "--all").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["MODEL", "IN"], ["local:mine", "cache"], [REF, "huggingface"], ["ollama:tiny:latest", "ollama"],
    ]  # fmt: skip
    for pool_id in ("whale", "own"):
        assert node.post(f"/v1/pools/{pool_id}/start")[0] in (200, 202)
        node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", pool_id, 60)
    assert node.status("whale")["model_path"] == str(open_dir / f"ollama/blobs/sha256-{sha256(body)}")
    assert Path(node.status("own")["model_path"]).is_relative_to(node.folder / "state-models/imported")
    missing = cli(node, "models", "pull", "ollama:none", "--dry-run")
    assert missing.returncode == 4 and "ollama:tiny:latest" in missing.stderr, missing
    planned = cli(node, "models", "pull", REF, "--dry-run")
    assert "is there already: 93.8 MiB that huggingface has: nothing is fetched if it is right" in planned.stdout, planned
    assert node.post("/v1/models/remove", {"ref": REF})[0] == 404
    assert path.exists() and cli(node, "models", "rm", "local:mine").returncode == 4, "a pool runs it"


@pytest.mark.slow
def test_what_was_verified_is_known_to_the_next_daemon_and_what_was_changed_is_not_run(node: Daemon, hub_cache: Path) -> None:
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready", "smol", 60)
    assert node.lines("fetch"), "it was hashed"
    node.terminate()
    before = len(node.lines("fetch"))
    node.start()
    node.until(lambda pool: bool(pool["ready"]), "the pool to be ready again", "smol", 60)
    assert len(node.lines("fetch")) == before
    node.terminate()
    blob = hub_cache / f"models--org--smol/blobs/{SMOL_SHA256}"
    with blob.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"changed")
    node.start()
    node.until(lambda pool: bool(pool["last_error"]), "the refusal", "smol", 60)
    assert "the network may not be used" in node.status("smol")["last_error"]
