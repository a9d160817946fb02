"""``preflight``: what it prints, its exit codes, and what it must not look at."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.config import Config, GpuConfig
from pool_managerd.config.load import load_config
from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot, ScanProblem
from pool_managerd.errors import NodeError
from pool_managerd.wiring import preflight as machine
from tests.cli.test_commands import Invoke
from tests.core.gpus import gpu

NO_GPUS = DeviceScan(problem=ScanProblem("nvml_unavailable", "cannot load libnvidia-ml.so.1: no driver here"))
ONE_GPU = DeviceScan(
    (DeviceSnapshot(0, "GPU-0", 1 << 34, 1 << 34, "8.9", "RTX 4090"),), driver_version="570", cuda_version="12.8"
)
NO_CUDA = "GPU-only enforcement: nvcc/nvidia-smi not found, so no engine is started on this machine"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config | None]:
    """No tools on PATH and no GPU; the list holds the configurations that GPUs were looked at for."""
    scanned: list[Config | None] = []

    def scan_once(config: Config | None = None) -> DeviceScan:
        scanned.append(config)
        return NO_GPUS if config is None or config.gpu.simulate is None else ONE_GPU

    monkeypatch.setattr(machine, "scan_once", scan_once)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return scanned


def write(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text)
    return "c.yaml"


def findings(out: str) -> dict[str, dict[str, Any]]:
    return {finding["code"]: finding for finding in json.loads(out)["findings"]}


def test_without_a_terminal_it_is_json_and_a_machine_without_a_gpu_is_a_1(invoke: Invoke) -> None:
    code, out, _ = invoke("preflight")
    told = json.loads(out)
    assert (code, told["ok"], told["profile"]) == (1, False, "home")
    assert findings(out)["gpu_required"] | {"remedy": []} == {
        "code": "gpu_required", "level": "fail", "subject": "CUDA", "message": NO_CUDA, "remedy": [],
    }  # fmt: skip
    assert NO_CUDA in out


def test_without_a_configuration_neither_the_folder_nor_the_environment_nor_a_daemon_counts(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pool-managerd.yaml").write_text("profile: dev\nnonsense: true\n")
    (tmp_path / ".runtime").write_text("no directory")
    monkeypatch.setenv("POOL_MANAGERD__PROFILE", "dev")
    monkeypatch.setenv("POOL_MANAGERD_URL", "http://127.0.0.1:1")
    code, out, _ = invoke("preflight")
    assert (code, json.loads(out)["profile"]) == (1, "home")
    assert {"not_writable", "control_port"}.isdisjoint(findings(out))


def test_the_table_has_whole_lines_on_the_narrowest_terminal(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = invoke("preflight")
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("FAIL     CUDA")
    assert NO_CUDA in lines[0]
    assert lines[1].startswith("           sudo ")
    assert lines[-1] == "profile home: not ready: 2 of 4 findings fail"
    assert invoke("preflight", "-o", "table")[1].splitlines()[0] == lines[0]


def test_a_configuration_in_dev_passes_here(invoke: Invoke, tmp_path: Path, open_dir: Path, tiny_model: Path) -> None:
    daemon = f"daemon: {{runtime_dir: {open_dir}}}\n"
    file = write(tmp_path, f"profile: dev\n{daemon}pools: [{{id: a, engine: llamacpp, model: 'file:{tiny_model}'}}]\n")
    code, out, _ = invoke("preflight", "--config", file)
    assert (code, json.loads(out)["profile"]) == (0, "dev")
    code, out, _ = invoke("preflight", "--config", file, "-o", "table")
    assert out.splitlines()[-1] == "profile dev: ready"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives engines a user of their own")
@pytest.mark.parametrize("closed", ["model", "runtime"])
def test_what_the_engines_user_cannot_reach_is_told_before_any_start(
    invoke: Invoke, tmp_path: Path, open_dir: Path, tiny_model: Path, closed: str
) -> None:
    private = open_dir / "private"
    private.mkdir(mode=0o700)
    model = private / "m.gguf" if closed == "model" else tiny_model
    (private / "m.gguf").write_bytes(tiny_model.read_bytes())
    runtime = open_dir if closed == "model" else private / "run"
    pools = f"pools: [{{id: a, engine: llamacpp, model: 'file:{model}', provisioning: {{mode: package}}}}]\n"
    config = f"profile: dev\ndaemon: {{runtime_dir: {runtime}}}\n{pools}"
    code, out, _ = invoke("preflight", "--config", write(tmp_path, config))
    assert code == 1
    assert f"{private} may not be entered by user" in findings(out)["pool_setup"]["message"]
    assert "daemon.engine_user: root" in findings(out)["pool_setup"]["remedy"][0]
    assert invoke("preflight", "--config", write(tmp_path, config.replace("daemon: {", "daemon: {engine_user: root, ")))[0] == 0


def test_what_the_configuration_allows_is_shown_as_allowed_but_never_what_a_start_needs(invoke: Invoke, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        pool = f"{{id: a, engine: llamacpp, model: m, provisioning: {{ports: [{port}]}}}}"
        file = write(tmp_path, f"preflight: {{allow: [port_taken]}}\npools: [{pool}]\n")
        code, out, _ = invoke("preflight", "--config", file)
        assert (code, findings(out)["gpu_required"]["level"], findings(out)["port_taken"]["level"]) == (1, "fail", "overridden")
        assert "\nALLOWED  port" in invoke("preflight", "--config", file, "-o", "table")[1]
    for needed in ("gpu_required", "device_mask:a", "nvml_hung", "driver_mismatch", "pool_setup"):
        code, _, err = invoke("preflight", "--config", write(tmp_path, f"preflight: {{allow: ['{needed}']}}\n"))
        assert (code, f"{needed.partition(':')[0]} cannot be allowed to fail" in err) == (2, True)


def test_pools_that_could_never_start_are_told_whatever_the_machine_has(
    invoke: Invoke, tmp_path: Path, open_dir: Path, tiny_model: Path
) -> None:
    daemon = f"daemon: {{runtime_dir: {open_dir}}}"
    pools = [
        f"{{id: good, engine: llamacpp, model: 'file:{tiny_model}', provisioning: {{mode: package}}}}",
        "{id: nomodel, engine: llamacpp, model: 'file:none.gguf', provisioning: {mode: package}}",
        f"{{id: nobin, engine: llamacpp, model: 'file:{tiny_model}', provisioning: {{mode: binary, binary: {{path: none}}}}}}",
        f"{{id: cont, engine: llamacpp, model: 'file:{tiny_model}', provisioning: {{mode: container}}}}",
        "{id: hub, engine: llamacpp, model: 'hf:org/repo/m.gguf', provisioning: {mode: package}}",
        "{id: remote, engine: vllm, model: m, provisioning: {mode: external, url: 'http://127.0.0.1:1'}}",
    ]
    code, out, _ = invoke("preflight", "--config", write(tmp_path, f"profile: dev\n{daemon}\npools: [{', '.join(pools)}]\n"))
    told = {f["subject"]: (f["message"], f["remedy"]) for f in json.loads(out)["findings"] if f["code"] == "pool_setup"}
    assert (code, sorted(told)) == (1, ["pool cont", "pool hub", "pool nobin", "pool nomodel"])
    assert (
        "there is no such file" in told["pool nomodel"][0] and "cannot run llamacpp in mode container yet" in told["pool cont"][0]
    )
    assert all(remedy and remedy[0].startswith("# ") for _, remedy in told.values())


def test_a_model_that_does_not_fit_into_ram_is_told_where_the_cpu_would_run_it(
    invoke: Invoke, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_ram_bytes", lambda: tiny_model.stat().st_size - 1)
    file = write(tmp_path, f"profile: dev\npools: [{{id: a, engine: llamacpp, model: 'file:{tiny_model}'}}]\n")
    code, out, _ = invoke("preflight", "--config", file)
    assert (code, findings(out)["ram"]["level"], findings(out)["ram"]["subject"]) == (1, "fail", "pool a")


def test_a_configuration_that_cannot_be_used_is_a_2(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("preflight", "--config", write(tmp_path, "profile: hme\n"))
    assert code == 2
    assert "profile" in err
    assert invoke("preflight", "--config", "missing.yaml")[0] == 2
    assert invoke("preflight", "-o", "xml")[0] == 2


def test_simulated_gpus_are_for_dev_alone(
    invoke: Invoke, tmp_path: Path, bare: list[Config | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.json").write_text("{}")
    code, _, err = invoke("preflight", "--config", write(tmp_path, "profile: home\n"), "--simulate-gpus", "t.json")
    assert (code, "profile: dev" in err) == (2, True)
    assert bare == []
    monkeypatch.setenv("POOL_MANAGERD__DAEMON__BIND", "nonsense, which is read only with a configuration")
    code, out, _ = invoke("preflight", "--simulate-gpus", "t.json")
    assert (code, json.loads(out)["profile"]) == (0, "dev")
    assert findings(out)["gpus"]["message"].startswith("simulated: 0 (RTX 4090)")
    assert bare[0] is not None
    assert bare[0].gpu.simulate == tmp_path / "t.json"


def test_a_look_at_the_gpus_that_is_refused_is_a_2(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_config: Config | None = None) -> DeviceScan:
        raise NodeError("cannot simulate GPUs: no C compiler", hint="install gcc")

    monkeypatch.setattr(machine, "scan_once", refuse)
    code, _, err = invoke("preflight")
    assert (code, err) == (2, "cannot simulate GPUs: no C compiler\nhint: install gcc\n")


def test_what_a_configuration_wants_is_read_from_it(tmp_path: Path) -> None:
    text = """
daemon: {engine_ports: "9000-9001", bind: "127.0.0.1:0"}
policy: {allow_schemes: [file, hf]}
pools:
  - {id: a, engine: llamacpp, model: "hf:org/repo", devices: "0,1", provisioning: {ports: [9000], flags: [--mlock]}}
  - {id: b, engine: vllm, model: m.gguf, provisioning: {mode: container}}
"""
    config = load_config(tmp_path / write(tmp_path, text), env={})
    wants = machine.wants_of(config)
    a, b = wants.pools
    assert (str(a.mask), a.ports, a.mlock, a.mode) == ("0,1", (9000,), True, "package")
    assert (b.mask, b.mode, b.mlock) == (None, "container", False)
    assert (wants.control_port, wants.engine_ports, wants.simulated) == (None, (9000, 9001), False)
    assert [pool.pool_id for pool in machine.wants_of(config, ["b"]).pools] == ["b"]
    assert machine.wants_of(Config(profile="dev", gpu=GpuConfig(simulate=Path("t")))).simulated


def test_the_directories_are_those_that_the_configuration_writes_to(tmp_path: Path) -> None:
    pool = "{id: a, engine: llamacpp, model: 'hf:o/r:Q4', provisioning: {binary: {install_dir: bin}}}"
    text = f"models: {{cache_dir: cache}}\npools: [{pool}]\n"
    config = load_config(tmp_path / write(tmp_path, text), env={}, overrides={"daemon.state_dir": "s", "daemon.runtime_dir": "r"})
    places = dict(machine.folders_of(config))
    assert places["model-cache"] == tmp_path / "cache"
    assert places["engine"] == tmp_path / "bin"
    assert (places["state"].name, places["runtime"].name) == ("s", "r")


def test_ports_of_our_own_count_as_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = f"profile: dev\npools: [{{id: a, engine: llamacpp, model: m, provisioning: {{ports: [{port}]}}}}]\n"
        config = load_config(tmp_path / write(tmp_path, text), env={})

        facts = replace(machine.facts_of(config, {}), folders=(), scan=NO_GPUS, setup_problems=())
        assert [f.code for f in machine.report_of(config, facts).failed] == ["port_taken"]
        assert machine.report_of(config, facts, own_ports=frozenset({port})).ok


SOURCE = '{source: {repo: r, ref: v, build: {cmake_flags: ["-DCMAKE_CUDA_ARCHITECTURES=%s"]}}}'


@pytest.mark.parametrize(
    ("provisioning", "cuda", "capabilities"),
    [
        ("{mode: container, container: {image: x, tag: server-cuda12.8}}", "12.8", ()),
        ("{mode: container, container: {image: x, tag: v0.11-cu129}}", "12.9", ()),
        ("{mode: container, container: {image: x, tag: latest}}", None, ()),
        (
            '{source: {repo: r, ref: v, build: {cmake_flags: ["-DCMAKE_CUDA_ARCHITECTURES=86-real;120"]}}}',
            None,
            ("8.6", "12.0+PTX"),
        ),
        ('{source: {repo: r, ref: v, build: {cmake_flags: ["-DCMAKE_CUDA_ARCHITECTURES=native"]}}}', None, ()),
    ],
)
def test_what_an_engine_is_built_for_is_read_where_it_is_written(
    tmp_path: Path, provisioning: str, cuda: str | None, capabilities: tuple[str, ...]
) -> None:
    text = f"pools: [{{id: a, engine: llamacpp, model: m.gguf, provisioning: {provisioning}}}]\n"
    wants = machine.wants_of(load_config(tmp_path / write(tmp_path, text), env={})).pools[0]
    assert (wants.engine_cuda, wants.engine_capabilities) == (cuda, capabilities)


def test_an_engine_built_for_another_gpu_is_told_before_it_is_started(tmp_path: Path) -> None:
    text = f"pools: [{{id: a, engine: llamacpp, model: m.gguf, provisioning: {SOURCE % '90-real'}}}]\n"
    config = load_config(tmp_path / write(tmp_path, text), env={})
    facts = replace(machine.facts_of(config, {}), scan=DeviceScan((gpu(0),), 1.0, "570.86.15", "12.8"))
    told = {f.code: f.message for f in machine.report_of(config, facts).failed}
    assert "it has compute capability 8.6, the build is for 9.0" in told["compute_capability"]
