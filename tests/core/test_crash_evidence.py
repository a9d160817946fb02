"""Which line of a log names the cause: real engines' logs of failed starts, and logs as public reports show them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_evidence import MAX_EVIDENCE_CHARS, find_cause, pieces
from pool_managerd.core.crash_remedies import MEANINGS, REMEDIES
from pool_managerd.core.crash_rules import all_meanings

LOGS = Path(__file__).parent / "crash_logs"
CAUSES = {
    "llamacpp-bad_cache_type": ("Unsupported cache type: Q8_0", "bad_flags", "fix_flags"),
    "llamacpp-bad_draft": ("invalid magic characters: 'XXXX', expected 'GGUF'", "bad_model", "fetch_model_again"),
    "llamacpp-bad_flag": ("error: invalid argument: --ctx-siz", "bad_flags", "fix_flags"),
    "llamacpp-bad_lora": ("invalid magic characters: 'XXXX', expected 'GGUF'", "bad_model", "fetch_model_again"),
    "llamacpp-bad_mmproj": ("invalid magic characters: 'XXXX', expected 'GGUF'", "bad_model", "fetch_model_again"),
    "llamacpp-bad_template": ("the supplied chat template is not supported", "bad_flags", "fix_flags"),
    "llamacpp-bad_tensor_place": ('argument "-ot": unknown buffer type', "bad_flags", "fix_flags"),
    "llamacpp-behind_a_progress_bar": ("CUDA error: out of memory", "vram_oom", "reduce_vram"),
    "llamacpp-coloured": ("llama_init_from_model: V cache quantization requires flash_attn", "bad_flags", "fix_flags"),
    "llamacpp-corrupt_magic": ("invalid magic characters: 'XXXX', expected 'GGUF'", "bad_model", "fetch_model_again"),
    "llamacpp-cublas_alloc": ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "vram_oom", "reduce_vram"),
    "llamacpp-cuda_buffer": ("l_load: error loading model: unable to allocate CUDA0 buffer", "vram_oom", "reduce_vram"),
    "llamacpp-cuda_driver_pair": (
        "tem has unsupported display driver / cuda driver combination",
        "driver_mismatch",
        "reboot_or_reload_driver",
    ),
    "llamacpp-cuda_ecc": ("CUDA error: uncorrectable ECC error encountered", "ecc", "replace_gpu"),
    "llamacpp-cuda_error_backtrace": ("CUDA error: an illegal memory access was encountered", "cuda", "check_gpu"),
    "llamacpp-cuda_invalid_image": ("CUDA error: device kernel image is invalid", "cuda", "use_gpu_build"),
    "llamacpp-cuda_launch_failure": ("CUDA error: unspecified launch failure", "cuda", "check_gpu"),
    "llamacpp-cuda_no_device": ("ailed to initialize CUDA: no CUDA-capable device is detected", "cuda", "fix_driver_setup"),
    "llamacpp-cuda_no_kernel_image": ("or: no kernel image is available for execution on the device", "cuda", "use_gpu_build"),
    "llamacpp-cuda_old_driver": (
        "CUDA driver version is insufficient for CUDA runtime version",
        "driver_mismatch",
        "update_driver",
    ),
    "llamacpp-cuda_old_ptx": ("the provided PTX was compiled with an unsupported toolchain.", "driver_mismatch", "update_driver"),
    "llamacpp-cuda_out_of_memory": (
        "allocating 16306.25 MiB on device 0: cudaMalloc failed: out of memory",
        "vram_oom",
        "reduce_vram",
    ),
    "llamacpp-cuda_without_words": ("/src/ggml/src/ggml-cuda/ggml-cuda.cu:97: CUDA error", "cuda", "check_gpu"),
    "llamacpp-cuda_wrong_arch": ("tible with CUDA arch 520. ggml-cuda.cu was compiled for: 520", "cuda", "use_gpu_build"),
    "llamacpp-embedded": ("cannot listen on 127.0.0.1:8080: Address already in use", "port_conflict", "free_port"),
    "llamacpp-illegal_instruction": (
        "n.sh: line 3: 77 Illegal instruction /opt/llama/llama-server",
        "illegal_instruction",
        "use_fitting_build",
    ),
    "llamacpp-in_use": ("art: cannot listen on 127.0.0.1:8080: Address already in use", "port_conflict", "free_port"),
    "llamacpp-invalid_device": ("invalid device: CUDA1", "bad_flags", "fix_flags"),
    "llamacpp-key_file_not_permitted": (
        "srv init: cannot read /etc/tls/key.pem: Permission denied",
        "permission",
        "check_permission",
    ),
    "llamacpp-key_not_found": ("yperparameters: key not found in model: llama.context_length", "bad_model", "fetch_model_again"),
    "llamacpp-missing_file": ("failed to open GGUF file 'nothere.gguf' (No such file or directory)", "", "put_model_back"),
    "llamacpp-missing_library": ("error while loading shared libraries: libgomp.so.1", "missing_library", "install_library"),
    "llamacpp-missing_tensor": ("missing tensor 'blk.0.attn_q.weight'", "bad_model", "fetch_model_again"),
    "llamacpp-missing_value": ('argument "--ctx-size": expected value for argument', "bad_flags", "fix_flags"),
    "llamacpp-no_magic": ("gguf_init_from_file_impl: failed to read magic", "bad_model", "fetch_model_again"),
    "llamacpp-not_permitted": ("ailed to open GGUF file '/models/m.gguf' (Permission denied)", "permission", "check_permission"),
    "llamacpp-old_glibc": (" `GLIBC_2.38' not found (required by /opt/llama/libllama.so)", "missing_library", "install_library"),
    "llamacpp-other_cpu": (
        "/llama-server: cannot execute binary file: Exec format error",
        "illegal_instruction",
        "use_fitting_build",
    ),
    "llamacpp-our_server_library": (
        "llamacpp_server: cannot load xllamacpp: a shared library is missing: libgomp.so.1; apt-get install libgomp1",
        "missing_library",
        "install_library",
    ),
    "llamacpp-our_server_value": (
        "llamacpp_server: cannot use 'nonsense' for --cache-type-k: it must be one of f16, q8_0",
        "bad_flags",
        "fix_flags",
    ),
    "llamacpp-our_server_flag": ("llamacpp_server: unknown flag --ctx-siz", "bad_flags", "fix_flags"),
    "llamacpp-port_in_use": ("couldn't bind HTTP server socket, hostname: 127.0.0.1, port:", "port_conflict", "free_port"),
    "llamacpp-removed_flag": ("ment: the argument has been removed. use --draft-max instead", "bad_flags", "fix_flags"),
    "llamacpp-removed_flag_alone": ("the argument has been removed. use --cpu-moe", "bad_flags", "fix_flags"),
    "llamacpp-symbol": ("llama/llama-server: undefined symbol: ggml_backend_reg_count", "missing_library", "install_library"),
    "llamacpp-tensor_count": ("ting_tensors: wrong number of tensors; expected 292, got 291", "bad_model", "fetch_model_again"),
    "llamacpp-truncated": (
        "data is not within the file bounds, model is corrupted or incomplete",
        "bad_model",
        "fetch_model_again",
    ),
    "llamacpp-uncaught": ("regex_error(error_stack)", "", ""),
    "llamacpp-unknown_architecture": ("unknown model architecture: 'xlama'", "bad_model", "use_newer_engine"),
    "llamacpp-unknown_tokenizer": (
        "oading model vocabulary: unknown pre-tokenizer type: 'qwen9'",
        "bad_model",
        "use_newer_engine",
    ),
    "llamacpp-v_cache_without_flash_attention": ("V cache quantization requires flash_attn", "bad_flags", "fix_flags"),
    "llamacpp-vulkan_memory": ("l_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory", "vram_oom", "reduce_vram"),
    "sglang-out_of_memory": (" has a total capacity of 23.64 GiB of which 1.1 GiB is free.", "vram_oom", "reduce_vram"),
    "sglang-scheduler_killed": (" scheduler is dead. Please check if there are relevant logs.", "", "look_at_worker"),
    "sglang-static_memory": ("enough memory. Please try to increase --mem-fraction-static.", "vram_oom", "room_for_cache"),
    "sglang-unbalanced": (" processes. pre_model_load_memory=3.1, local_gpu_memory=22.4", "vram_oom", "stop_vram_users"),
    "sglang-unknown_flag": ("server.py: error: unrecognized arguments: --mem-fraction 0.8", "bad_flags", "fix_flags"),
    "sglang-watchdog": ("atchdog timeout (self.watchdog_timeout=300, self.soft=False)", "hung", "wait_or_restart"),
    "tgi-shard_failed": ("RuntimeError: weight model.embed_tokens.weight does not exist", "bad_model", "fetch_model_again"),
    "triton-bad_model": (" 1: Invalid argument: unknown platform 'tensorflow_graphdef'", "bad_model", "fetch_model_again"),
    "triton-poll_failed": ("failed for model directory 'ensemble_model': failed to read ", "bad_model", "fetch_model_again"),
    "triton-port_in_use": (" service: Unavailable - Socket '0.0.0.0:8000' already in use", "port_conflict", "free_port"),
    "triton-unknown_flag": ("tritonserver: unrecognized option '--model-repo'", "bad_flags", "fix_flags"),
    "vllm-cache_too_small": ("Error: To serve at least one request with the models's max s", "vram_oom", "room_for_cache"),
    "vllm-context_too_long": (
        "Value error, User-specified max_model_len (513) is greater than the derived max_model_len",
        "bad_flags",
        "lower_context",
    ),
    "vllm-core_killed": ("MPClient: engine core exited unexpectedly; starting cleanup", "", "look_at_worker"),
    "vllm-core_without_room": ("ValueError: No available memory for the cache blocks.", "vram_oom", "room_for_cache"),
    "vllm-cuda_error": ("rError: CUDA error: an illegal memory access was encountered", "cuda", "check_gpu"),
    "vllm-ecc": ("untimeError: CUDA error: uncorrectable ECC error encountered", "ecc", "replace_gpu"),
    "vllm-gpu_lost": ("vllm.third_party.pynvml.NVMLError_GpuIsLost: GPU is lost", "driver_reset", "reset_gpu"),
    "vllm-mismatch": (
        "LError_LibRmVersionMismatch: Driver/library version mismatch",
        "driver_mismatch",
        "reboot_or_reload_driver",
    ),
    "vllm-missing_library": (
        "ImportError: libcudart.so.12: cannot open shared object file",
        "missing_library",
        "install_library",
    ),
    "vllm-missing_module": ("ModuleNotFoundError: No module named 'flash_attn'", "missing_library", "install_library"),
    "vllm-missing_tokenizer": (
        "ValueError: Couldn't instantiate the backend tokenizer from one of:",
        "bad_model",
        "template_or_tokenizer",
    ),
    "vllm-missing_weights": ("RuntimeError: Cannot find any model weights with `/models/m`", "bad_model", "fetch_model_again"),
    "vllm-nccl": ("csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error", "cuda", "check_gpu"),
    "vllm-no_driver": ("se check that you have an NVIDIA GPU and installed a driver.", "driver_mismatch", "fix_driver_setup"),
    # vllm-project/vllm#39610: Triton names the kernel first, and the reason four lines later.
    "vllm-no_fp8_on_this_gpu": ("type fp8e4nv not supported in this architecture.", "bad_model", "use_other_format"),
    "vllm-no_model_type": ("Unrecognized model in /models/m. Should have a `model_type` key", "bad_model", "fetch_model_again"),
    "vllm-no_room_on_device": ("Error: Free memory on device (3.22/4.0 GiB) on startup is le", "vram_oom", "stop_vram_users"),
    "vllm-not_permitted": (" [Errno 13] Permission denied: '/models/m/model.safetensors'", "permission", "check_permission"),
    "vllm-old_driver": ("oo old (found version 11040). Please update your GPU driver.", "driver_mismatch", "update_driver"),
    "vllm-port_in_use": ("OSError: [Errno 98] Address already in use", "port_conflict", "free_port"),
    "vllm-quantization_without_config": ("Value error, Cannot find the config file for awq", "bad_flags", "fix_flags"),
    # vllm-project/vllm#4327, and #14040 of a scheme: it is computed by newer GPUs alone.
    "vllm-quantization_of_newer_gpus": (
        "Value error, The quantization method fp8 is not supported for the current GPU.",
        "bad_model",
        "use_other_format",
    ),
    "vllm-scheme_of_newer_gpus": ("('Quantization scheme is not supported for '", "bad_model", "use_other_format"),
    # vllm-project/vllm#41108, of weights in another format than the engine takes them for.
    "vllm-tensor_sizes_differ": ("The size of tensor a (3072) must match the size of tensor b", "bad_model", "match_weights"),
    "vllm-truncated_weights": (": Error while deserializing header: MetadataIncompleteBuffer", "bad_model", "fetch_model_again"),
    "vllm-unknown_architecture": (
        "odel` but Transformers does not recognize this architecture.",
        "bad_model",
        "use_newer_engine",
    ),
    "vllm-too_large_cache": ("is less than requested memory for kv (400.0 GiB).", "", "lower_cache"),
    "vllm-unknown_flag": ("error: unrecognized arguments: --max-modellen 4", "bad_flags", "fix_flags"),
    "vllm-unknown_quantization": ("Value error, Unknown quantization method: nonsense.", "bad_flags", "fix_flags"),
    "vllm-unsupported_architecture": (
        "supported for now. Supported architectures: dict_keys(['A'])",
        "bad_model",
        "use_newer_engine",
    ),
    # verl-project/verl#834 and vllm-project/vllm#42813: vLLM's weight loaders compare shapes.
    "vllm-weights_do_not_fit": ("Attempted to load weight (torch.Size([512]))", "bad_model", "match_weights"),
    "vllm-weights_of_another_size": ("Tried to load weights of size torch.Size([3096576,", "bad_model", "match_weights"),
    "vllm-worker_killed": ("Worker proc VllmWorker-0 died unexpectedly, shutting down executor.", "", "look_at_worker"),
    "vllm-worker_out_of_memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB.",
        "vram_oom",
        "reduce_vram",
    ),
}
"""Part of the line that is quoted, the class that it gives, and the remedy; by the engine and what happened."""
PARTING = (
    "exiting due to", "run with -h", "\x1b", "detached]", "For further information", "warnings.warn", "See root cause",
    "cleaning up",
)  # fmt: skip


def test_every_recorded_log_has_its_cause_named_here() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(CAUSES)


@pytest.mark.parametrize("name", sorted(CAUSES))
def test_the_line_that_names_the_cause_is_quoted(name: str) -> None:
    lines = (LOGS / f"{name}.log").read_bytes().decode().split("\n")
    cause = find_cause(lines, name.partition("-")[0])
    part, crash, remedy = CAUSES[name]
    found = cause.text
    assert part in found
    assert (cause.crash or "", cause.remedy) == (crash, remedy)
    assert cause.at is not None and part.split()[-1] in lines[cause.at]
    assert not any(word in found for word in PARTING)
    assert len(found) <= MAX_EVIDENCE_CHARS


def test_every_rule_has_a_log_that_it_explains() -> None:
    logs: dict[str, list[list[str]]] = {path.stem.partition("-")[0]: [] for path in LOGS.glob("*.log")}
    for path in LOGS.glob("*.log"):
        logs[path.stem.partition("-")[0]].append(path.read_bytes().decode().split("\n"))
    used = {find_cause(lines, engine).rule for engine, found in logs.items() for lines in found}
    assert [rule.pattern.pattern for rule in all_meanings() if rule not in used] == []


def test_every_class_and_remedy_is_explained() -> None:
    assert MEANINGS.keys() == set(CrashClass)
    named = {rule.remedy for rule in all_meanings()} | {meaning.remedy for meaning in MEANINGS.values()}
    assert named <= REMEDIES.keys()
    assert REMEDIES.keys() - named == {"find_killer", "run_in_foreground", "startup_too_slow"}, "given by the way it ended"
    assert all(len(sentence) <= 130 for sentence in REMEDIES.values())


@given(st.lists(st.text(max_size=200), max_size=30), st.sampled_from(["llamacpp", "vllm", "tgi", "triton", "?"]))
def test_whatever_was_written_what_is_quoted_was_written(lines: list[str], engine: str) -> None:
    cause = find_cause(lines, engine)
    assert (cause.at is None) == (cause.text == "")
    if cause.at is not None:
        spaced = " ".join(" ".join(pieces(lines[cause.at])).split())
        assert " ".join(cause.text.removesuffix("…").split()) in spaced


def test_a_cause_is_found_behind_pages_of_consequences() -> None:
    lines = ["llama_model_load: error loading model: missing tensor 'x'", *["#1 0x00 in main"] * 5_000, "exiting due to y"]
    assert find_cause(lines, "llamacpp").text == "llama_model_load: error loading model: missing tensor 'x'"


def test_where_nothing_names_a_cause_the_last_line_that_is_no_farewell_is_quoted() -> None:
    assert (
        find_cause(["loading", "almost there", "main: exiting due to model loading error", ""], "llamacpp").text == "almost there"
    )
    assert find_cause(["[Inferior 1 (process 9) detached]"], "llamacpp").text == ""
    assert find_cause([], "vllm").text == ""


def test_a_progress_bar_leaves_its_last_state_alone() -> None:
    assert list(pieces("a\x1b[0m\n 10%\r 50%\r100%\nx\r\n")) == ["a", "100%", "x"]


def test_an_error_behind_what_a_hole_in_the_log_reads_as_is_quoted() -> None:
    assert (
        find_cause(list(pieces("\0" * 100_000 + "error: model file truncated\0\n")), "llamacpp").text
        == "error: model file truncated"
    )


@pytest.mark.parametrize(
    "line",
    [
        "(" * 2_000,
        "a." * 1_000,
        "Worker " * 300,
        "\x1b[" * 1_000,
        "1." * 1_000,
        "error: " * 300,
        " " * 2_000,
        "failed to allocate " * 110,
        "failed to open GGUF" * 100,
        "Model architectures [" * 90,
        "Free memory on device " * 90,
        "error: argument " * 120,
        "Socket '" * 250,
    ],
)
def test_the_search_is_linear_in_what_the_engine_wrote(line: str) -> None:
    def seconds(count: int) -> float:
        began = time.process_time()
        find_cause([line] * count, "vllm")
        find_cause([line] * count, "llamacpp")
        return time.process_time() - began

    assert seconds(400) < 8 * max(seconds(100), 0.01)
