"""From a pool to a PreparedEngine, in every mode; real engines then run on what it prepared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import PreparedEngine, ResolvedModel
from pool_managerd.engines import modes as module
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import EngineError, PoolError, SpecError
from tests.conftest import confined, free_port, http_status, wait_until

MakePool = Callable[..., PoolConfig]
Run = Callable[[tuple[str, ...], dict[str, str]], subprocess.Popen[bytes]]
MODEL = ResolvedModel("file:m.gguf", "/m/m.gguf", 10)


def engines(config: Config, **options: bool) -> EngineProvisioner:
    has_gpu = options.get("gpu", False)
    return EngineProvisioner(config, PortAllocator("21000-28999"), has_gpu=lambda: has_gpu, run=confined())


def script(folder: Path, body: str = "exit 0") -> Path:
    path = folder / "engine"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


async def refusal(config: Config, pool: PoolConfig, model: ResolvedModel | None = MODEL) -> PoolError:
    provisioner = engines(config)
    try:
        if pool.provisioning.mode == "external":
            provisioner.attach(pool)
        else:
            await provisioner.prepare(pool, model)
    except PoolError as error:
        return error
    raise AssertionError("it was not refused")


def ask(prepared: PreparedEngine) -> str:
    body = json.dumps({"prompt": "hello", "n_predict": 4}).encode()
    request = urllib.request.Request(f"{prepared.url}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(json.load(answer)["content"])


async def test_mode_binary_prepares_a_real_llama_server_that_serves(
    llama_server: Path, tiny_model: Path, dev_config: Config, make_pool: MakePool, run_engine: Run
) -> None:
    pool = make_pool(
        slots=2, ctx=256, provisioning={"mode": "binary", "binary": {"path": str(llama_server)}, "flags": ["-t", "1"]}
    )
    daemon = dev_config.daemon.model_copy(update={"runtime_dir": dev_config.base_dir / "run"})
    config = dev_config.model_copy(update={"daemon": daemon})
    prepared = await engines(config).prepare(pool, ResolvedModel("file:tiny", str(tiny_model)))
    assert prepared.slots is not None and "--slot-save-path" in prepared.flags
    Path(prepared.slots.directory).mkdir(parents=True)  # which the launch does
    assert prepared.engine_version.startswith("llamacpp-b")
    assert (prepared.provisioning_mode, prepared.slots_total, prepared.ctx, prepared.warnings) == ("binary", 2, 256, ())
    process = run_engine(prepared.argv, dict(prepared.env))
    wait_until(lambda: http_status(prepared.url + prepared.health_path) == 200, "llama-server")
    with urllib.request.urlopen(f"{prepared.url}/props", timeout=5) as answer:
        assert json.load(answer)["total_slots"] == 2
    assert http_status(f"{prepared.url}/metrics") == 200
    assert ask(prepared)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


async def test_mode_package_prepares_the_embedded_engine_that_serves(
    tiny_model: Path, dev_config: Config, make_pool: MakePool, run_engine: Run
) -> None:
    pytest.importorskip("xllamacpp")
    pool = make_pool(slots=2, ctx=256, provisioning={"flags": ["--threads", "1"]})
    prepared = await engines(dev_config).prepare(pool, ResolvedModel("file:tiny", str(tiny_model)))
    assert prepared.provisioning_mode == "package"
    assert prepared.engine_version.startswith("xllamacpp-2")
    assert prepared.binary_path == sys.executable
    assert "--require-gpu" not in prepared.flags
    run_engine(prepared.argv, dict(prepared.env))
    wait_until(lambda: http_status(prepared.url + prepared.health_path) == 200, "the embedded engine")
    assert ask(prepared)


async def test_preparing_twice_gives_the_same_and_spawns_nothing(dev_config: Config, make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    provisioner, pool = engines(dev_config), make_pool(devices=(0, 2))
    first = await provisioner.prepare(pool, MODEL)
    assert await provisioner.prepare(pool, MODEL) == first
    assert first.device_mask == "0,2"
    assert first.env["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert not first.verbatim


async def test_gpu_only_profiles_make_the_embedded_engine_insist_on_a_gpu(make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    prepared = await engines(Config(profile="home"), gpu=True).prepare(make_pool(), MODEL)
    assert "--require-gpu" in prepared.flags
    assert prepared.flags[prepared.flags.index("--n-gpu-layers") + 1] == "999"


async def test_two_pools_get_two_ports_and_a_port_that_was_taken_meanwhile_is_left(
    dev_config: Config, make_pool: MakePool
) -> None:
    pytest.importorskip("xllamacpp")
    provisioner = engines(dev_config)
    first = await provisioner.prepare(make_pool(id="a"), MODEL)
    second = await provisioner.prepare(make_pool(id="b"), MODEL)
    assert first.port != second.port
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", first.port))
        thief.listen()
        again = await provisioner.prepare(make_pool(id="a"), MODEL)
    assert again.port not in (first.port, second.port)


async def test_the_pools_own_port_is_used(dev_config: Config, make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    port = free_port()
    prepared = await engines(dev_config).prepare(make_pool(provisioning={"ports": [port]}), MODEL)
    assert prepared.port == port and not any("engine_ports" in said for said in prepared.warnings)


async def test_where_the_pools_own_ports_are_taken_it_is_said_which_one_it_has(dev_config: Config, make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        own = taken.getsockname()[1]
        prepared = await engines(dev_config).prepare(make_pool(provisioning={"ports": [own]}), MODEL)
    (said,) = (said for said in prepared.warnings if "engine_ports" in said)
    assert f"runs on port {prepared.port} of daemon.engine_ports" in said and f"({own};" in said


async def test_a_pool_with_wrong_flags_holds_no_port(dev_config: Config, make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    ports = PortAllocator("21000-28999")
    provisioner = EngineProvisioner(dev_config, ports)
    with pytest.raises(SpecError, match=r"did you mean '--threads'\?"):
        await provisioner.prepare(make_pool(provisioning={"flags": ["--thread", "1"]}), MODEL)
    assert not ports.all_claimed()


async def test_a_flag_that_only_the_binary_takes_says_so_in_mode_package(dev_config: Config, make_pool: MakePool) -> None:
    pytest.importorskip("xllamacpp")
    error = await refusal(dev_config, make_pool(provisioning={"flags": ["--mlock"]}))
    assert error.message == "cannot use the flag --mlock: the embedded engine does not take it"
    assert error.hint is not None
    assert "mode binary" in error.hint


async def test_a_binary_that_cannot_run_is_a_failed_preload_with_the_remedy(
    open_dir: Path, make_pool: MakePool, dev_config: Config
) -> None:
    plain = open_dir / "plain"
    plain.write_text("x")
    for path, reason, hint in (
        ("none", "No such file or directory", "check provisioning.binary.path"),
        ("plain", "it is not executable", f"chmod +x {plain}"),
        (".", "it is not a file", "name the llama-server binary itself"),
    ):
        error = await refusal(dev_config, make_pool(provisioning={"mode": "binary", "binary": {"path": path}}))
        assert isinstance(error, EngineError)
        assert error.message == f"preload failed: cannot run {os.path.normpath(open_dir / path)}: {reason}"
        assert (error.hint, error.code, error.pool_id) == (hint, "PRELOAD_FAILED", "p")


async def test_a_binary_that_is_no_llama_server_is_prepared_with_warnings(
    open_dir: Path, make_pool: MakePool, dev_config: Config
) -> None:
    script(open_dir)
    prepared = await engines(dev_config).prepare(make_pool(provisioning={"mode": "binary", "binary": {"path": "engine"}}), MODEL)
    assert prepared.binary_path == str(open_dir / "engine")
    assert prepared.engine_version == "unknown"
    assert len(prepared.warnings) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"provisioning": {"mode": "source"}}, "cannot run llamacpp in mode source yet"),
        ({"provisioning": {"mode": "container"}}, "cannot run llamacpp in mode container yet"),
        ({"provisioning": {"mode": "binary"}}, "provisioning.binary.path is not set"),
        ({"provisioning": {"mode": "binary", "binary": {"url": "https://x/y"}}}, "downloads are not supported yet"),
        ({"engine": "vllm"}, "cannot run vllm in mode container (the default) yet"),
        ({"engine": "tgi", "provisioning": {"mode": "package"}}, "cannot run tgi in mode package yet"),
        ({"provisioning": {"mode": "external"}}, "mode external needs provisioning.url"),
        ({"provisioning": {"mode": "external", "url": "ftp://x"}}, "it is no base URL"),
        ({"provisioning": {"mode": "external", "url": "http://h:99999"}}, "it is no base URL"),
        ({"provisioning": {"mode": "external", "url": "http://u:pw@h"}}, "holds a password"),
    ],
)
async def test_what_this_version_cannot_do_is_refused_with_what_it_can(
    dev_config: Config, make_pool: MakePool, keys: dict[str, object], message: str
) -> None:
    pool = make_pool(**keys)
    error = await refusal(dev_config, pool)
    assert message in error.message
    assert error.hint is not None
    plan = engines(dev_config).plan(pool)
    assert [step["kind"] for step in plan["steps"]] == ["refused"]
    assert message in plan["steps"][0]["detail"]


async def test_without_the_package_the_default_is_refused_naming_how_to_install_it(
    dev_config: Config, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "package_installed", lambda package: False)
    for pool in (make_pool(), make_pool(provisioning={"mode": "package"})):
        error = await refusal(dev_config, pool)
        assert error.hint is not None
        assert "pip install 'pool-managerd[llamacpp]'" in error.hint


async def test_mode_external_attaches_and_owns_nothing(make_pool: MakePool) -> None:
    pool = make_pool(engine="triton", slots=3, provisioning={"mode": "external", "url": "http://10.0.0.5:8000/"})
    engine = engines(Config()).attach(pool)
    assert (engine.url, engine.health_path, engine.slots_total) == ("http://10.0.0.5:8000", "/v2/health/ready", 3)
    own = make_pool(health_path="/up", provisioning={"mode": "external", "url": "https://h"})
    assert engines(Config()).attach(own).health_path == "/up"


async def test_a_directory_is_no_model_for_llamacpp_and_a_check_may_refuse_a_file(
    dev_config: Config, make_pool: MakePool, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    assert "it is a directory" in (await refusal(dev_config, make_pool(), ResolvedModel("m", str(tmp_path)))).message
    assert "without a model" in (await refusal(dev_config, make_pool(), None)).message

    def refuse(path: str) -> None:
        raise SpecError(f"cannot use {path} as a GGUF model: no")

    with pytest.raises(SpecError, match="as a GGUF model: no"):
        await EngineProvisioner(dev_config, PortAllocator("21000-28999"), check_model=refuse).prepare(make_pool(), MODEL)


def test_the_plan_tells_the_steps_and_is_the_same_every_time(dev_config: Config, make_pool: MakePool) -> None:
    pool = make_pool(slots=2, ctx=2048, devices=(1,), provisioning={"mode": "binary", "binary": {"path": "bin/llama-server"}})
    plan = engines(dev_config).plan(pool)
    assert plan == engines(dev_config).plan(pool)
    assert plan["pool_id"] == "p"
    assert plan["steps"] == [
        {"kind": "model", "detail": "file:m.gguf"},
        {"kind": "engine", "detail": f"llamacpp in mode binary: {dev_config.base_dir}/bin/llama-server"},
        {"kind": "port", "detail": "127.0.0.1, the first free of 8080-8999"},
        {"kind": "run", "detail": "2 slots, context 2048, GPU 1"},
    ]


async def test_a_binary_that_lacks_a_shared_library_is_found_out_before_it_is_started(
    dev_config: Config, make_pool: MakePool, open_dir: Path, llama_server: Path
) -> None:
    alone = open_dir / "llama-server"
    shutil.copy(llama_server, alone)  # without the libraries that lie beside it
    pool = make_pool(provisioning={"mode": "binary", "binary": {"path": str(alone)}})
    error = await refusal(dev_config, pool)
    assert isinstance(error, EngineError)
    assert f"cannot load {alone}: a shared library is missing: libllama-server-impl.so" in error.message
    assert "LD_LIBRARY_PATH" in str(error.hint)
    beside = {"LD_LIBRARY_PATH": str(llama_server.parent)}
    how = {"mode": "binary", "binary": {"path": str(alone)}, "env": beside}
    assert (await engines(dev_config).prepare(make_pool(provisioning=how), MODEL)).binary_path == str(alone)


def test_what_is_missing_is_named_with_debians_package(dev_config: Config, make_pool: MakePool, open_dir: Path) -> None:
    fake = open_dir / "llama-server"
    said = "error while loading shared libraries: libgomp.so.1: cannot open shared object file: No such file or directory"
    fake.write_text(f'#!/bin/sh\necho "$0: {said}" >&2\nexit 127\n')
    fake.chmod(0o755)
    asked = engines(dev_config)
    pool = make_pool(provisioning={"mode": "binary", "binary": {"path": str(fake)}, "flags": ["--ctx-siz", "1"]})
    found = {problem.message: problem.hint for problem in asked.problems(pool, None)}
    lacking = next(message for message in found if "shared library" in message)
    assert "libgomp.so.1" in lacking and found[lacking] == "apt-get install libgomp1 (Debian, Ubuntu)"
    assert any("--ctx-siz" in message for message in found), "its flags are held against the recorded ones"
    fake.write_text("#!/bin/sh\necho done\n")
    assert not any("shared library" in problem.message for problem in asked.problems(pool, None)), "it was installed meanwhile"
