"""One model and nothing to configure: what `run` works out, and that it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pool_managerd.cli import running
from pool_managerd.cli.exits import CommandFailed
from pool_managerd.cli.running import Wishes, default_cache, free_address, name_of, run_config, run_model
from pool_managerd.config import PoolConfig
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.supervision.prospects import contexts
from tests.models.hub_beside import HubBeside

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
POLICY = (
    'policy: {allow_network: true, allow_schemes: [file, hf, http], allow_domains: ["127.0.0.1"]}\nmodels: {keep_free_bytes: 0}\n'
)
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("oci://docker.io/ai/smollm2:135M-Q4_K_M", "smollm2-135m-q4_k_m"),
        ("s3://models/a/Tiny.Q8_0.gguf", "tiny.q8_0"),
        ("ollama:llama3.2:1b", "llama3.2-1b"),
        ("hf:bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M", "smollm2-135m-instruct"), ("hf:org/Repo@v1", "repo"),
        ("hf:org/repo/sub/Big-Model-00001-of-00003.gguf", "big-model"), ("file:/models/My model (1).gguf", "my-model-1"),
        ("https://host/a/b.gguf?x=1", "b"), ("file:/models/llama-8b", "llama-8b"), ("file:/", "model"),
        ("file:/" + "n" * 200, "n" * 63), ("file:/a..b.gguf", "a-b"),
    ],
)  # fmt: skip
def test_a_pool_is_called_after_its_model(ref: str, name: str) -> None:
    assert name_of(ref) == name and PoolConfig(id=name, engine="llamacpp", model=ref).id == name


def test_the_longest_context_that_the_model_was_trained_for_is_tried_first() -> None:
    wanted = PoolConfig(id="a", engine="llamacpp", model="file:a", slots=2)
    assert contexts(wanted, ModelShape("llama", 1, ctx_train=131_072)) == (65_536, 32_768, 16_384, 8_192, 4_096)
    assert contexts(wanted, ModelShape("llama", 1, ctx_train=5_000)) == (10_000, 8_192, 4_096)
    assert contexts(wanted, None) == (16_384, 8_192, 4_096)
    assert contexts(wanted.model_copy(update={"ctx": 100}), None) == (100,)


def test_who_types_a_reference_has_it_fetched_unless_a_configuration_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = run_config(Wishes("hf:org/repo:Q4_K_M"), None, tmp_path)
    assert found.policy.allow_network and found.policy.allow_schemes == ("file", "hf") and found.pools == ()
    assert found.model_cache == tmp_path / "cache/pool-managerd/models" == default_cache()
    assert not run_config(Wishes("m.gguf"), None, tmp_path).policy.allow_network
    file = tmp_path / "pm.yaml"
    file.write_text("profile: dev\npools: [{id: a, engine: llamacpp, model: 'file:a.gguf'}]\n")
    found = run_config(Wishes("hf:org/repo:Q4_K_M"), file, tmp_path)
    assert not found.policy.allow_network and found.profile == "dev" and found.pools == ()


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        (Wishes("none.gguf"), "there is no such file"), (Wishes("hf:org/repo:Q4", pool_id="a b"), "cannot use --id"),
        (Wishes("hf:org/repo:Q4", devices=""), "cannot use --devices"), (Wishes("  "), "REF is empty"),
        (Wishes("hf:org/repo"), "vllm is not installed"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_begins(
    wishes: Wishes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandFailed, match=why) as caught:
        run_model(wishes, None)
    assert caught.value.hint or why.startswith("cannot use")


def test_that_an_engine_runs_as_root_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pool_managerd.wiring.preflight.needs_root", lambda *_: "it may not be entered")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert run_model(Wishes("m.gguf", dry_run=True), None) == 1
    told = capfd.readouterr().err
    assert "The engine runs as root" in told and "cannot use" in told


def test_the_usual_port_is_left_to_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(running, "USUAL_PORT", taken.getsockname()[1])
        assert free_address() == "127.0.0.1:0"


@pytest.fixture
def hub(smol_model: Path) -> Iterator[HubBeside]:
    made = HubBeside(repository="org/smol", files={NAME: smol_model.read_bytes()})
    yield made
    made.end()


def command(folder: Path, hub: HubBeside, *words: str) -> subprocess.Popen[str]:
    (folder / "pool-managerd.yaml").write_text(POLICY)
    return subprocess.Popen(
        [sys.executable, "-m", "pool_managerd.cli", "run", "hf:org/smol:Q4_1", "--ctx", "512", *words], cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": SOURCE, "HF_ENDPOINT": hub.hub.url, "TMPDIR": str(folder)},
    )  # fmt: skip


def test_a_name_on_a_hub_is_fetched_run_and_asked_and_nothing_else_is_left(open_dir: Path, hub: HubBeside) -> None:
    planned = command(open_dir, hub, "--dry-run")
    _, told = planned.communicate(timeout=60)
    assert planned.returncode == 0 and "93.8 MiB to fetch" in told and "512 tokens of context" in told, told
    assert 0 < hub.hub.served <= 2_000_000 and [one for one in hub.hub.asked if "/resolve/" in one.path] == []
    answered = command(open_dir, hub, "--bind", "127.0.0.1:0", "-m", "What is the capital of France?")
    said, told = answered.communicate(timeout=120)
    assert answered.returncode == 0 and said == "The capital of France is Paris.\n", (said, told)
    assert "Fetching the model of pool 'smol'" in told and hub.hub.served <= 2_000_000, "what was read is not read again"
    assert sorted(path.name for path in open_dir.iterdir()) == [".state-models", "pool-managerd.yaml"]


@pytest.mark.slow
def test_ctrl_c_ends_it_and_what_was_fetched_is_gone_on_with(open_dir: Path, hub: HubBeside) -> None:
    hub.hub.script = [hub.hub.cut_after(30_000_000)] * 3
    begun = command(open_dir, hub, "--bind", "127.0.0.1:0")
    assert begun.stderr is not None
    for line in begun.stderr:
        if "Fetched" in line:
            break
    begun.send_signal(signal.SIGINT)
    told = begun.stderr.read()
    assert begun.wait(30) == 1 and "what was fetched is kept" in told, told
    begun.communicate()
    ready = command(open_dir, hub, "--bind", "127.0.0.1:0")
    assert ready.stderr is not None
    for line in ready.stderr:
        if line.startswith("Ready: "):
            break
    ready.send_signal(signal.SIGINT)
    told = ready.stderr.read()
    assert ready.wait(30) == 0 and f"{NAME}" not in told, told
    ready.communicate()
    assert hub.hub.asked[-1].range is not None, "it went on where it was"
