"""What the vLLM adapter sets itself, and what it refuses to let a configuration set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.fit import DeviceFraction
from pool_managerd.core.reservations import Assignment
from pool_managerd.engines import vllm
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import PoolError, SpecError
from tests.core.gpus import GIB, gpu

MakePool = Callable[..., PoolConfig]
TWO = Assignment((gpu(0, 24), gpu(1, 12)), {"GPU-00000000": 12 * GIB, "GPU-00000001": 9 * GIB}, (0.5, 0.5))


@pytest.fixture
def model(tmp_path: Path) -> ResolvedModel:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return ResolvedModel(f"file:{folder}", str(folder))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A command as an environment with vLLM has it."""
    (tmp_path / "venv/lib/python3.12/site-packages/vllm-0.33.0.dist-info").mkdir(parents=True)
    path = tmp_path / "venv/bin/vllm"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def flags_of(pool: PoolConfig, assignment: Assignment | None = TWO) -> tuple[str, ...]:
    return vllm.build_flags(pool, ResolvedModel("file:/m", "/m"), 8000, assignment)


async def test_it_is_prepared_for_its_gpus_and_keeps_to_what_it_was_promised(
    dev_config: Config, make_pool: MakePool, model: ResolvedModel, program: Path
) -> None:
    (program.parent.parent.parent / "vllm").symlink_to(program)
    how = {
        "mode": "binary",
        "binary": {"path": str(program.parent.parent.parent / "vllm")},
        "flags": ["--seed", "7", "--enforce-eager"],
    }
    pool = make_pool(engine="vllm", ctx=8192, slots=4, devices=[0, 1], tensor_split="auto", provisioning=how)
    engines = EngineProvisioner(dev_config, PortAllocator("21000-28999"))
    prepared = await engines.prepare(pool, model, TWO)
    port = str(prepared.port)
    assert prepared.argv == (
        str(program.parent.parent.parent / "vllm"), "serve", model.local_path, "--enforce-eager", "--gpu-memory-utilization",
        "0.5", "--host", "127.0.0.1", "--max-model-len", "2048", "--max-num-seqs", "4", "--port", port, "--seed", "7",
        "--tensor-parallel-size", "2", "--served-model-name", "p", model.id,
    )  # fmt: skip
    assert prepared.engine_version == "vllm-0.33.0", "read, not run: the command would end with an error"
    assert prepared.env["CUDA_VISIBLE_DEVICES"] == "GPU-00000000,GPU-00000001" and prepared.env["HF_HUB_OFFLINE"] == "1"
    assert (prepared.engine, prepared.health_path, prepared.slots_total) == ("vllm", "/health", 4)
    assert engines.sizing_flags(pool, model.local_path)[0] == "vllm-0.33.0"
    assert [step["kind"] for step in engines.plan(pool)["steps"]] == ["model", "engine", "port", "run"]


async def test_only_a_model_folder_can_be_served(dev_config: Config, make_pool: MakePool, tmp_path: Path, program: Path) -> None:
    pool = make_pool(engine="vllm", provisioning={"mode": "binary", "binary": {"path": str(program)}})
    with pytest.raises(SpecError, match=r"no folder with a config\.json"):
        await EngineProvisioner(dev_config, PortAllocator("21000-28999")).prepare(pool, ResolvedModel("m", str(tmp_path)), TWO)


def test_without_gpus_no_gpu_is_spoken_of(make_pool: MakePool) -> None:
    flags = flags_of(make_pool(engine="vllm", served_name="chat"), None)
    assert "--tensor-parallel-size" not in flags and "--gpu-memory-utilization" not in flags and "--max-model-len" not in flags
    assert flags[-3:] == ("--served-model-name", "chat", "file:/m")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--tensor-parallel-size", "4"], "the daemon sets it"),
        (["--gpu-memory-utilization=0.99"], "the daemon sets it"),
        (["--port", "1"], "the daemon sets it"),
        (["--trust-remote-code"], "it runs code that came with the model"),
        (["--api-key", "secret"], "can be read by every user"),
        (["--cpu-offload-gb", "8"], "GPU-only enforcement"),
        (["--kv-cache-memory-bytes", "1"], "would not keep to the memory"),
        (["--worker-cls", "x.Y"], "this engine does not know it"),
        (["--seed"], "it needs a value"),
        (["--enforce-eager=1"], "it takes no value"),
        (["model"], "flags begin with a dash"),
    ],
)
def test_flags_that_would_go_round_the_daemon_are_refused(make_pool: MakePool, flags: list[str], why: str) -> None:
    with pytest.raises(SpecError) as caught:
        flags_of(make_pool(engine="vllm", provisioning={"flags": flags}))
    assert why in caught.value.message and caught.value.hint and "secret" not in caught.value.message


@pytest.mark.parametrize(
    "name", ["HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "VLLM_API_KEY", "VLLM_PLUGINS", "VLLM_PORT", "A=B", ""]
)
def test_variables_that_would_go_round_the_daemon_are_refused(make_pool: MakePool, name: str) -> None:
    with pytest.raises(PoolError):
        vllm.build_env(make_pool(engine="vllm", provisioning={"env": {name: "1"}}))
    allowed = vllm.build_env(make_pool(engine="vllm", provisioning={"env": {"VLLM_LOGGING_LEVEL": "DEBUG"}}))
    assert allowed["VLLM_LOGGING_LEVEL"] == "DEBUG" and allowed["VLLM_NO_USAGE_STATS"] == "1"


def test_what_decides_its_memory_is_read_from_the_pool_or_from_a_submitted_command_line(make_pool: MakePool) -> None:
    assert vllm.settings_of(make_pool(engine="vllm", ctx=8192, slots=4)) == DeviceFraction(0.9, 2048)
    assert vllm.settings_of(make_pool(engine="vllm")) == DeviceFraction(0.9)
    told = ("serve", "/m", "--gpu-memory-utilization", "0.5", "--max-model-len=4096", "-tp", "2", "--max-num-seqs", "8")
    assert vllm.submitted_settings(told) == DeviceFraction(0.5, 4096, 2)
    odd = (
        "--gpu-memory-utilization",
        "1.5",
        "--max-model-len",
        "auto",
        "--tensor-parallel-size",
        "-1",
        "--max-num-seqs=9e9",
        "=",
    )
    assert vllm.submitted_settings(odd) == vllm.submitted_settings(()) == DeviceFraction(0.92, 0, 1)


def test_a_command_beside_no_package_has_no_version(tmp_path: Path) -> None:
    assert vllm.version_of(tmp_path / "bin/vllm") == "vllm-unknown"
