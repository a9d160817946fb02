"""What the vLLM adapter sets itself, and what it refuses to let a configuration set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.estimate import DeviceFraction
from pool_managerd.engines.flags import raise_all
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.engines.vllm import command as vllm
from pool_managerd.errors import PoolError, SpecError
from tests.conftest import confined
from tests.core.gpus import GIB, gpu

MakePool = Callable[..., PoolConfig]
TWO = Allocation((gpu(0, 24), gpu(1, 12)), {"GPU-00000000": 12 * GIB, "GPU-00000001": 9 * GIB}, (0.5, 0.5))


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


def flags_of(pool: PoolConfig, allocation: Allocation | None = TWO) -> tuple[str, ...]:
    return built_with(pool, vllm.Around(), allocation)


def built_with(pool: PoolConfig, around: vllm.Around, allocation: Allocation | None = None) -> tuple[str, ...]:
    own, wrong = vllm.checked_flags(pool, around)
    raise_all(wrong)
    return vllm.build_flags(pool, own, ResolvedModel("file:/m", "/m"), 8000, allocation, around)


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
        str(program.parent.parent.parent / "vllm"), "serve", model.local_path,
        "--disable-access-log-for-endpoints", "/health,/metrics",
        "--enforce-eager", "--gpu-memory-utilization", "0.5", "--host", "127.0.0.1", "--max-model-len", "2048",
        "--max-num-seqs", "4", "--port", port, "--seed", "7", "--shutdown-timeout", "4", "--tensor-parallel-size", "2",
        "--served-model-name", "p", model.id,
    )  # fmt: skip
    assert prepared.engine_version == "vllm-0.33.0", "read, not run: the command would end with an error"
    assert prepared.env["CUDA_VISIBLE_DEVICES"] == "GPU-00000000,GPU-00000001" and prepared.env["HF_HUB_OFFLINE"] == "1"
    assert (prepared.engine, prepared.health_path, prepared.slots_total) == ("vllm", "/health", 4)
    assert engines.size(pool, model).program.version == "vllm-0.33.0"
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
    "flags",
    [
        ["--chat-template", "chat.jinja"], ["--enable-lora", "--lora-modules", "a=/m/a", "b=/m/b", "--max-loras", "2"],
        ["--speculative-config", '{"method": "ngram"}'], ["--hf-overrides", "{}"], ["--generation-config", "vllm"],
        ["--tokenizer", "/m/t"], ["--load-format", "dummy"], ["--compilation-config.mode", "3"], ["-cc.mode=3"],
        ["--max_num_batched_tokens", "2048"], ["--no-enable-prefix-caching"], ["-q", "awq"], ["--rope-scaling.x", "1"],
    ],
)  # fmt: skip
def test_flags_that_the_engine_lists_may_be_written(make_pool: MakePool, flags: list[str]) -> None:
    if flags[0] == "--rope-scaling.x":
        with pytest.raises(SpecError, match="does not know it"):
            flags_of(make_pool(engine="vllm", provisioning={"flags": flags}))
        return
    built = flags_of(make_pool(engine="vllm", provisioning={"flags": flags}))
    value = flags[-1].partition("=")[2] if flags[0] == "-cc.mode=3" else flags[-1]
    assert value.replace("_", "-") in built or value in built


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--device-memory-utilization", "0.9"], "the daemon sets it"), (["--api_key", "k"], "can be read by every user"),
        (["--data_parallel_size=2"], "one engine is one replica"), (["-dp", "2"], "one engine is one replica"),
        (["--middleware", "os.system"], "runs code"), (["--config", "x.yaml"], "past these rules"), (["--uds", "/x"], "health"),
        (["--kv-transfer-config.kv_role", "x"], "other machines"), (["--device-ids", "1"], "use pools[].devices"),
        (["-h"], "prints something"), (["--hf_token=x"], "can be read by every user"),
    ],
)  # fmt: skip
def test_no_spelling_passes_by_the_rules(make_pool: MakePool, flags: list[str], why: str) -> None:
    with pytest.raises(SpecError) as caught:
        flags_of(make_pool(engine="vllm", provisioning={"flags": flags}))
    assert why in caught.value.message


def test_values_of_all_uses_of_a_list_are_kept(make_pool: MakePool) -> None:
    flags = ["--enable-lora", "--lora-modules", "a=/m/a", "--seed", "1", "--lora-modules", "b=/m/b", "c=/m/c", "--seed", "2"]
    built = flags_of(make_pool(engine="vllm", provisioning={"flags": flags}))
    at = built.index("--lora-modules")
    assert built[at : at + 5] == ("--lora-modules", "a=/m/a", "b=/m/b", "c=/m/c", "--max-num-seqs")
    assert built[built.index("--seed") + 1] == "2"


def test_paths_are_relative_to_the_configuration(make_pool: MakePool, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").touch()
    (tmp_path / "lora").mkdir()
    flags = ["--chat-template", "chat.jinja", "--lora-modules", "a=lora", "--generation-config", "vllm"]
    pool = make_pool(engine="vllm", provisioning={"flags": flags})
    built = built_with(pool, vllm.Around(base_dir=tmp_path))
    assert str(tmp_path / "chat.jinja") in built and f"a={tmp_path}/lora" in built and "vllm" in built


@pytest.mark.parametrize(
    ("version", "grace_ms", "added"),
    [("vllm-0.32.0+cpu", 5_000, "4"), ("vllm-0.33.0", 30_000, "29"), ("vllm-0.33.0", 1_000, None), ("vllm-0.9.2", 5_000, None),
     ("vllm-unknown", 5_000, None)],
)  # fmt: skip
def test_running_requests_may_end_within_the_time_that_a_stop_gives(
    make_pool: MakePool, version: str, grace_ms: int, added: str | None
) -> None:
    around = vllm.Around(grace_ms=grace_ms, version=vllm.numbers_of(version))
    built = built_with(make_pool(engine="vllm"), around)
    assert (built[built.index("--shutdown-timeout") + 1] if "--shutdown-timeout" in built else None) == added
    assert ("/health,/metrics" in built) == (vllm.numbers_of(version) >= (0, 30)), "an older engine may not know these flags"
    own = make_pool(
        engine="vllm", provisioning={"flags": ["--shutdown-timeout", "1", "--disable-access-log-for-endpoints", "/x"]}
    )
    built = built_with(own, around)
    assert built[built.index("--shutdown-timeout") + 1] == "1" and "/x" in built and "/health,/metrics" not in built


HELP = """\
usage: vllm serve [model_tag] [options]

options:
  --brand-new BRAND_NEW
                        --not-an-option but a description
  --fresh, --no-fresh   New in this version. (default: False)
"""


async def test_an_engine_is_asked_for_flags_that_are_newer_than_the_recorded_ones(
    dev_config: Config, make_pool: MakePool, model: ResolvedModel, open_dir: Path
) -> None:
    program = open_dir / "vllm"
    known = "".join(f"  {'--' + name} X\n" for name in (option.names[0][2:] for option in vllm.OPTIONS.options))
    program.write_text(f"#!/bin/sh\n[ \"$*\" = 'serve --help=all' ] && cat <<'END'\n{HELP}{known}\nEND\n")
    program.chmod(0o755)
    how = {"mode": "binary", "binary": {"path": str(program)}, "flags": ["--brand_new", "7", "--no-fresh"]}
    engines = EngineProvisioner(dev_config, PortAllocator("21000-28999"), run=confined())
    prepared = await engines.prepare(make_pool(engine="vllm", provisioning=how), model, None)
    assert {"--brand-new", "7", "--no-fresh"} <= set(prepared.flags)
    with pytest.raises(SpecError, match="does not know it"):
        await engines.prepare(make_pool(engine="vllm", provisioning={**how, "flags": ["--not-an-option"]}), model, None)


CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (CONFIG, 4096), ({}, None), ({"n_positions": 1024}, 1024), ({"text_config": CONFIG}, 4096),
        ({**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 16384),
        ({**CONFIG, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({**CONFIG, "model_max_length": 6000}, 6000), ({"max_position_embeddings": "many"}, None), ([], None),
    ],
)  # fmt: skip
def test_a_context_that_the_model_was_not_made_for_is_refused_before_the_launch(
    make_pool: MakePool, tmp_path: Path, config: object, longest: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for slots in (1, 2):
        if longest is not None:
            vllm.check_ctx(make_pool(engine="vllm", ctx=longest * slots, slots=slots), vllm.read_model(str(tmp_path)))
            with pytest.raises(SpecError, match=f"says {longest} at most") as caught:
                vllm.check_ctx(make_pool(engine="vllm", ctx=(longest + 1) * slots, slots=slots), vllm.read_model(str(tmp_path)))
            assert f"set ctx to {longest * slots} or less" in str(caught.value.hint)
        else:
            vllm.check_ctx(make_pool(engine="vllm", ctx=1 << 30, slots=slots), vllm.read_model(str(tmp_path)))
    for how in ({"flags": ["--hf_overrides", "{}"]}, {"env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}}):
        vllm.check_ctx(make_pool(engine="vllm", ctx=1 << 30, provisioning=how), vllm.read_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "flags", "warmup"),
    [
        ("LlamaForCausalLM", [], "completion"), ("BertModel", [], "embedding"), ("BertForSequenceClassification", [], "rerank"),
        ("Qwen3ForCausalLM", ["--runner", "pooling"], "embedding"), ("Qwen3ForCausalLM", ["--convert=classify"], "none"),
    ],
)  # fmt: skip
def test_the_first_request_is_one_that_the_model_answers(
    make_pool: MakePool, tmp_path: Path, architecture: str, flags: list[str], warmup: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    pool = make_pool(engine="vllm", provisioning={"flags": flags})
    assert vllm.warmup_of(vllm.checked_flags(pool, vllm.Around())[0], vllm.read_model(str(tmp_path))) == warmup


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
