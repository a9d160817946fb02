"""What decides llama-server's memory, what it logs of it, and that the estimate is what real engines allocate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from bench.llamacpp_log import Allocations, parse_allocations

from pool_managerd.core.memory.estimate import EngineSettings, estimate
from pool_managerd.engines.llamacpp import server
from pool_managerd.engines.llamacpp.memory import settings_of
from pool_managerd.models.gguf_shape import read_gguf_shape
from tests.conftest import free_port, http_status, wait_until
from tests.models.made_models import (
    write_bert,
    write_deepseek2,
    write_gemma3,
    write_gemma_embedding,
    write_llama4,
    write_nemotron_h,
)

MIB = 1 << 20
NEAR = 0.10
Launch = Callable[..., Allocations]


def settings_in(flags: Sequence[str], version: str = "") -> EngineSettings:
    found = settings_of(flags, version=version).settings
    assert isinstance(found, EngineSettings)
    return found


def test_a_command_line_gives_its_settings_by_any_name() -> None:
    flags = "-m x -c 8192 --parallel 4 -ctk q8_0 --cache-type-v=q4_0 -ub 256 -fa off -nkvo --swa-full -ngl 20 -cram 0 -kvu"
    assert settings_in(flags.split()) == EngineSettings(
        ctx=8192, parallel=4, cache_type_k="q8_0", cache_type_v="q4_0", ubatch=256, flash_attn=False, kv_unified=True,
        kv_on_gpu=False, swa_full=True, gpu_layers=20, cache_ram_bytes=0,
    )  # fmt: skip


def test_without_flags_the_engines_defaults_hold() -> None:
    assert settings_in([]) == EngineSettings(parallel=4, kv_unified=True), "slots are automatic and share one cache"
    assert settings_in(["-np", "2"]) == EngineSettings(parallel=2)
    assert settings_in(["-cram", "-1"]).cache_ram_bytes is None


@pytest.mark.parametrize("layers", ["all", "auto", "-1"])
def test_all_layers_are_on_the_gpu_unless_a_number_says_otherwise(layers: str) -> None:
    assert settings_in(["-ngl", layers]).gpu_layers is None


def test_the_last_use_wins_and_odd_values_are_passed_over() -> None:
    found = settings_in(["-c", "1", "-c", "two", "--what", "-ub", "1024", "-b", "512", "-fa", "--np", "-np"])
    assert (found.ctx, found.ubatch, found.flash_attn, found.parallel) == (0, 512, True, 4)
    assert settings_in(["-c", "9" * 15]).ctx == 1 << 40


def test_a_flag_whose_effect_is_not_counted_is_named_as_it_was_written() -> None:
    found = settings_in(["-otd", "x=CPU", "--spec-draft-ncmoe", "4", "--no_mmproj_offload", "--mmproj-offload", "-cd", "8"])
    assert found.unmodelled == ("-otd", "--spec-draft-ncmoe", "--no-mmproj-offload", "-cd")


def test_files_beside_the_model_are_named() -> None:
    found = settings_of(["--mmproj", "/m/p.gguf", "--lora", "/m/a.gguf,/m/b.gguf", "-md", "/m/draft.gguf"])
    assert (found.files, found.draft) == (("/m/p.gguf", "/m/a.gguf", "/m/b.gguf"), "/m/draft.gguf")


def test_old_builds_are_known_to_keep_more_logits() -> None:
    versions = ("unknown", "llamacpp-b1-571d0d5", "llamacpp-b9272-571d0d5", "llamacpp-b10068-571d0d5")
    assert [settings_in([], version=version).all_logits for version in versions] == [False, False, True, False]


def test_allocations_are_read_by_device_and_kind() -> None:
    found = parse_allocations(
        [
            "0.01 I load_tensors: offloaded 31/31 layers to GPU",
            "0.01 I load_tensors:   CPU_Mapped model buffer size =    28.50 MiB",
            "0.01 I load_tensors:        CUDA0 model buffer size =    92.00 MiB",
            "load_tensors: RPC0[127.0.0.1:50601] model buffer size =    10.00 MiB",
            "llama_context:  CUDA_Host  output buffer size =     0.50 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =    45.00 MiB",
            "llama_memory_recurrent:      CUDA0 RS buffer size =     1.00 MiB",
            "sched_reserve:      CUDA0 compute buffer size =    13.00 MiB",
            "sched_reserve:  CUDA_Host compute buffer size =     3.00 MiB",
            "sched_reserve:      CUDA0 compute buffer size =    14.00 MiB",
        ]
    )
    assert found.by_device() == {
        "CPU_Mapped": 28.5 * MIB, "CUDA0": 152 * MIB, "RPC0[127.0.0.1:50601]": 10 * MIB, "CUDA_Host": 3.5 * MIB,
    }  # fmt: skip
    assert (found.gpu_bytes, found.host_bytes) == (162 * MIB, 32 * MIB)
    assert (found.of("compute"), found.of("RS"), found.of("KV")) == (17 * MIB, MIB, 45 * MIB)


def test_old_logs_a_trial_load_and_an_earlier_launch_are_understood() -> None:
    old = [
        "llm_load_tensors:      CUDA0 buffer size =  7317.71 MiB",
        "llama_kv_cache_init:      CUDA0 KV buffer size =   180.00 MiB",
    ]
    assert parse_allocations(old).gpu_bytes == int(7317.71 * MIB) + 180 * MIB
    real = "llama_kv_cache:        CPU KV buffer size =    45.00 MiB"
    trial = ["print_info: no_alloc              = 1", "llama_kv_cache: CPU KV buffer size = 7.00 MiB", "print_info: no_alloc = 0"]
    assert parse_allocations([*trial, real]).host_bytes == 45 * MIB
    again = ["common_params_print_info: build 1 (571d0d5) with GNU 11.4.0"]
    assert parse_allocations([real, *again, real]).host_bytes == 45 * MIB
    assert parse_allocations([real, "constructing llama_context", real]).host_bytes == 90 * MIB, "a draft model's cache"


def test_odd_lines_mean_nothing_and_cost_nothing() -> None:
    odd = [
        "buffer size = 1.00 MiB",
        ": " + "x" * 1_000_000 + " buffer size =",
        "a" * 2_000 + " buffer size = ",
        "KV buffer size = ∞ MiB",
    ]
    assert parse_allocations(odd * 20) == Allocations()


@pytest.fixture
def launch(llama_server: Path, tmp_path: Path) -> Launch:
    """Load a model in a real engine, and return what it says that it allocated."""

    def load(model: Path, *flags: str, package: bool = False) -> Allocations:
        binary = (sys.executable, "-I", server.__file__) if package else (str(llama_server),)
        port, log = free_port(), tmp_path / "engine.log"
        common = ("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "-lv", "4", "--no-webui")
        with log.open("wb") as out:
            engine = subprocess.Popen((*binary, *common, *flags), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            wait_until(lambda: engine.poll() is not None or http_status(f"http://127.0.0.1:{port}/health") == 200, "the engine")
        finally:
            engine.kill()
            engine.wait(10)
        text = log.read_text(errors="replace")
        found = parse_allocations(text.splitlines())
        assert found.entries, text[-2_000:]
        return found

    return load


def expected_on_cpu(model: Path, flags: tuple[str, ...]) -> int:
    found = estimate(read_gguf_shape(str(model)), settings_in(flags), overhead_bytes_per_gpu=0, n_devices=0)
    return found.weights.size_bytes + found.kv.size_bytes + found.compute.size_bytes


SMOL = ("--ctx-size 4096 --parallel 2", "--ctx-size 2048 --parallel 4 -ctk q8_0 -ctv q8_0 -ub 256")


@pytest.mark.parametrize("flags", SMOL)
@pytest.mark.parametrize("package", [False, True])
def test_the_estimate_is_what_a_real_engine_allocates(launch: Launch, smol_model: Path, flags: str, package: bool) -> None:
    if package:
        pytest.importorskip("xllamacpp")
    argv = (*flags.split(), "-ngl", "0")
    found = launch(smol_model, *argv, package=package)
    assert found.gpu_bytes == 0
    assert expected_on_cpu(smol_model, argv) == pytest.approx(found.host_bytes, rel=NEAR)


@pytest.mark.parametrize(
    ("write", "flags"),
    [
        (write_gemma3, "--ctx-size 8192 --parallel 2 -ngl 0"),
        (write_gemma3, "--ctx-size 8192 --parallel 4 --kv-unified -ngl 0 -fa off"),
        (write_deepseek2, "--ctx-size 8192 --parallel 2 -ngl 0"),
        (write_llama4, "--ctx-size 32768 --parallel 2 -ngl 0"),
    ],
)
def test_windows_and_compressed_caches_are_estimated_as_the_engine_allocates_them(
    launch: Launch, tmp_path: Path, write: Callable[[Path], Path], flags: str
) -> None:
    model = write(tmp_path / "m.gguf")
    found = launch(model, *flags.split())
    shape, settings = read_gguf_shape(str(model)), settings_in(flags.split())
    assert estimate(shape, settings, overhead_bytes_per_gpu=0).kv.size_bytes == pytest.approx(found.of("KV"), rel=0.01)
    assert expected_on_cpu(model, tuple(flags.split())) == pytest.approx(found.host_bytes, rel=NEAR)


def test_a_state_beside_attention_and_layers_with_neither_are_estimated_as_allocated(launch: Launch, tmp_path: Path) -> None:
    model, flags = write_nemotron_h(tmp_path / "m.gguf"), ("--ctx-size", "8192", "--parallel", "2", "-ngl", "0")
    found = launch(model, *flags)
    kv = estimate(read_gguf_shape(str(model)), settings_in(flags), overhead_bytes_per_gpu=0).kv.size_bytes
    assert kv == pytest.approx(found.of("KV") + found.of("RS"), rel=0.01)
    assert expected_on_cpu(model, flags) == pytest.approx(found.host_bytes, rel=NEAR)


@pytest.mark.parametrize("write", [write_bert, write_gemma_embedding])
def test_encoders_are_estimated_without_a_cache_as_the_engine_has_none(
    launch: Launch, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    model, flags = write(tmp_path / "m.gguf"), ("--ctx-size", "32768", "--parallel", "4", "-ngl", "0", "--embeddings")
    found = launch(model, *flags)
    assert found.of("KV") == 0
    estimated = estimate(read_gguf_shape(str(model)), settings_in(flags), overhead_bytes_per_gpu=0)
    assert estimated.kv.size_bytes == 0 and "KV" not in " ".join(estimated.explain())
    assert expected_on_cpu(model, flags) == pytest.approx(found.host_bytes, rel=0.2)


def test_states_are_kept_once_more_for_every_drafted_token(tmp_path: Path) -> None:
    shape = read_gguf_shape(str(write_nemotron_h(tmp_path / "m.gguf")))

    def kv(*flags: str) -> int:
        return estimate(shape, settings_in(["-c", "256", "-np", "1", *flags]), overhead_bytes_per_gpu=0).kv.size_bytes

    assert shape.recurrent is not None
    assert kv("--spec-type", "draft-mtp") - kv() == 3 * shape.recurrent.bytes_per_sequence
    assert kv("--spec_type=ngram-mod,draft-mtp", "--spec-draft-n-max", "7") - kv() == 7 * shape.recurrent.bytes_per_sequence
    assert kv("--spec-type", "ngram-mod") == kv()


def test_experts_that_stay_in_main_memory_are_counted_there(tmp_path: Path) -> None:
    shape = read_gguf_shape(str(write_llama4(tmp_path / "m.gguf")))
    experts = sum(size for name, size in shape.tensors if "_exps" in name)

    def weights(*flags: str) -> tuple[int, int]:
        found = estimate(shape, settings_in(["-c", "256", "-ngl", "999", *flags]), overhead_bytes_per_gpu=0)
        return found.weights.size_bytes, found.host.size_bytes

    on_gpu, in_ram = weights()
    every: list[tuple[str, ...]] = [
        ("--cpu-moe",),
        ("-cmoe",),
        ("--n-cpu-moe", "8"),
        ("-ot", r"\.ffn_.*_exps\.=CPU"),
        ("-ot", "exps=CPU"),
    ]
    for flags in every:
        assert weights(*flags) == (on_gpu - experts, in_ram + experts), flags
    half: list[tuple[str, ...]] = [
        ("-ncmoe", "4"),
        ("-ot", r"blk\.[13]\.ffn_.*_exps=CPU"),
        ("-ot", "blk.1.*exps=CPU,blk.3.*exps=CPU"),
        ("-ot", "blk.1.*exps=CPU", "-ot", "blk.3.*exps=CPU"),
    ]
    for flags in half:
        assert weights(*flags) == (on_gpu - experts // 2, in_ram + experts // 2), flags


@pytest.mark.parametrize(
    "flag",
    [
        "--override-kv llama.block_count=int:3",
        "-ot (a+)+=CPU",
        "-ot x=CUDA1",
        "--spec-type draft-mtp",
        "-sm row",
        "--no-mmproj-offload",
    ],
)
def test_a_flag_that_is_not_counted_is_said_and_makes_the_estimate_wider(smol_model: Path, flag: str) -> None:
    shape = read_gguf_shape(str(smol_model))
    plain, found = (
        estimate(shape, settings_in(flags.split()), overhead_bytes_per_gpu=0) for flags in ("-c 4096", f"-c 4096 {flag}")
    )
    assert any(line.startswith("not counted: -") for line in found.explain())
    assert found.error_bytes > plain.error_bytes


def test_an_unknown_architecture_is_called_a_guess(tmp_path: Path) -> None:
    from tests.models.made_models import Maker

    maker = Maker(tmp_path / "m.gguf", "brandnew", 4)
    maker.numbers(attention__head_count=4, attention__head_count_kv=2)
    found = estimate(read_gguf_shape(str(maker.done())), settings_in(["-c", "4096"]), overhead_bytes_per_gpu=0)
    assert found.kv.error_fraction == 1.0
    assert any("'brandnew' is unknown here" in line and "guess" in line for line in found.explain())


def test_a_draft_models_cache_has_types_of_its_own(smol_model: Path) -> None:
    shape = read_gguf_shape(str(smol_model))

    def kv(*flags: str) -> int:
        settings = replace(settings_in(["-c", "4096", "-np", "1", *flags]), draft=shape)
        return estimate(shape, settings, overhead_bytes_per_gpu=0).kv.size_bytes

    alone = kv() // 2
    assert kv("-ctk", "q8_0", "-ctv", "q8_0") == alone + alone * 34 // 64
    assert kv("--cache_type_k_draft", "q8_0", "--spec-draft-type-v=q8_0") == alone + alone * 34 // 64


@pytest.fixture
def devices(llama_server: Path, run_engine: Callable[[tuple[str, ...], dict[str, str]], subprocess.Popen[bytes]]) -> str:
    """Two devices that llama.cpp treats as GPUs: its own remote backend on the CPU of this machine."""
    binary = llama_server.parent / "ggml-rpc-server"
    if not binary.is_file():
        pytest.skip(f"no {binary.name} beside {llama_server}")
    ports = (free_port(), free_port())
    for port in ports:
        run_engine((str(binary), "-H", "127.0.0.1", "-p", str(port), "-t", "1"), {})
        wait_until(lambda port=port: _listens(port), "the remote backend")  # type: ignore[misc]
    return ",".join(f"127.0.0.1:{port}" for port in ports)


def _listens(port: int) -> bool:
    """Seen in the kernel's table: the backend serves one connection at a time, and a probe would be one."""
    return f"0100007F:{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()


def test_devices_hold_what_was_estimated_for_each(launch: Launch, smol_model: Path, devices: str) -> None:
    flags = ("--ctx-size", "2048", "--parallel", "2", "-ngl", "999")
    shape = read_gguf_shape(str(smol_model))
    both = estimate(shape, settings_in(flags), overhead_bytes_per_gpu=0, n_devices=2)
    found = launch(smol_model, *flags, "--rpc", devices, "--tensor-split", "0.6,0.4")
    real = [size for name, size in found.by_device().items() if name.startswith("RPC")]
    assert len(real) == 2
    for reserved, held in zip(both.per_device((0.6, 0.4)), real, strict=True):
        assert held <= reserved <= held * 1.25, "at least what it holds; more only by the copies that CUDA makes for several GPUs"
    assert both.weights.size_bytes + both.kv.size_bytes == pytest.approx(
        sum(real) - sum(e.size_bytes for e in found.entries if e.kind == "compute" and not e.on_host), rel=0.01
    )
    assert shape.input_bytes == pytest.approx(found.by_device()["CPU_Mapped"], rel=0.01), "the token embedding stays"
