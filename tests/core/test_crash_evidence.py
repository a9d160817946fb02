"""Which line of a log names the cause: real engines' logs of failed starts, and logs as public reports show them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pool_managerd.core.crash_evidence import MAX_EVIDENCE_CHARS, named_cause, pieces

LOGS = Path(__file__).parent / "crash_logs"
CAUSES = {
    "llamacpp-bad_cache_type": "Unsupported cache type: Q8_0",
    "llamacpp-bad_draft": "invalid magic characters: 'XXXX', expected 'GGUF'",
    "llamacpp-bad_flag": "error: invalid argument: --ctx-siz",
    "llamacpp-bad_lora": "invalid magic characters: 'XXXX', expected 'GGUF'",
    "llamacpp-bad_mmproj": "invalid magic characters: 'XXXX', expected 'GGUF'",
    "llamacpp-bad_template": "the supplied chat template is not supported",
    "llamacpp-bad_tensor_place": 'argument "-ot": unknown buffer type',
    "llamacpp-behind_a_progress_bar": "CUDA error: out of memory",
    "llamacpp-coloured": "llama_init_from_model: V cache quantization requires flash_attn",
    "llamacpp-corrupt_magic": "invalid magic characters: 'XXXX', expected 'GGUF'",
    "llamacpp-cuda_error_backtrace": "CUDA error: an illegal memory access was encountered",
    "llamacpp-cuda_out_of_memory": "allocating 16306.25 MiB on device 0: cudaMalloc failed: out of memory",
    "llamacpp-embedded": "cannot listen on 127.0.0.1:8080: Address already in use",
    "llamacpp-invalid_device": "invalid device: CUDA1",
    "llamacpp-missing_file": "failed to open GGUF file 'nothere.gguf' (No such file or directory)",
    "llamacpp-missing_library": "error while loading shared libraries: libgomp.so.1",
    "llamacpp-missing_tensor": "missing tensor 'blk.0.attn_q.weight'",
    "llamacpp-missing_value": 'argument "--ctx-size": expected value for argument',
    "llamacpp-port_in_use": "couldn't bind HTTP server socket, hostname: 127.0.0.1, port:",
    "llamacpp-truncated": "data is not within the file bounds, model is corrupted or incomplete",
    "llamacpp-uncaught": "regex_error(error_stack)",
    "llamacpp-unknown_architecture": "unknown model architecture: 'xlama'",
    "llamacpp-v_cache_without_flash_attention": "V cache quantization requires flash_attn",
    "tgi-shard_failed": "RuntimeError: weight model.embed_tokens.weight does not exist",
    "vllm-context_too_long": "Value error, User-specified max_model_len (513) is greater than the derived max_model_len",
    "vllm-core_without_room": "ValueError: No available memory for the cache blocks.",
    "vllm-missing_tokenizer": "ValueError: Couldn't instantiate the backend tokenizer from one of:",
    "vllm-missing_weights": "RuntimeError: Cannot find any model weights with `/models/m`",
    "vllm-port_in_use": "OSError: [Errno 98] Address already in use",
    "vllm-quantization_without_config": "Value error, Cannot find the config file for awq",
    "vllm-missing_library": "ImportError: libcudart.so.12: cannot open shared object file",
    "vllm-unknown_flag": "error: unrecognized arguments: --max-modellen 4",
    "vllm-worker_killed": "Worker proc VllmWorker-0 died unexpectedly, shutting down executor.",
    "vllm-worker_out_of_memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB.",
}
PARTING = (
    "exiting due to", "run with -h", "\x1b", "detached]", "For further information", "warnings.warn", "See root cause",
    "cleaning up",
)  # fmt: skip


def test_every_recorded_log_has_its_cause_named_here() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(CAUSES)


@pytest.mark.parametrize("name", sorted(CAUSES))
def test_the_line_that_names_the_cause_is_quoted(name: str) -> None:
    found = named_cause((LOGS / f"{name}.log").read_bytes().decode().split("\n"), name.partition("-")[0])
    assert CAUSES[name] in found
    assert not any(word in found for word in PARTING)
    assert len(found) <= MAX_EVIDENCE_CHARS


def test_a_cause_is_found_behind_pages_of_consequences() -> None:
    lines = ["llama_model_load: error loading model: missing tensor 'x'", *["#1 0x00 in main"] * 5_000, "exiting due to y"]
    assert named_cause(lines, "llamacpp") == "llama_model_load: error loading model: missing tensor 'x'"


def test_where_nothing_names_a_cause_the_last_line_that_is_no_farewell_is_quoted() -> None:
    assert named_cause(["loading", "almost there", "main: exiting due to model loading error", ""], "llamacpp") == "almost there"
    assert named_cause(["[Inferior 1 (process 9) detached]"], "llamacpp") == ""
    assert named_cause([], "vllm") == ""


def test_a_progress_bar_leaves_its_last_state_alone() -> None:
    assert list(pieces("a\x1b[0m\n 10%\r 50%\r100%\nx\r\n")) == ["a", "100%", "x"]


def test_an_error_behind_what_a_hole_in_the_log_reads_as_is_quoted() -> None:
    assert (
        named_cause(list(pieces("\0" * 100_000 + "error: model file truncated\0\n")), "llamacpp") == "error: model file truncated"
    )


@pytest.mark.parametrize(
    "line", ["(" * 2_000, "a." * 1_000, "Worker " * 300, "\x1b[" * 1_000, "1." * 1_000, "error: " * 300, " " * 2_000]
)
def test_the_search_is_linear_in_what_the_engine_wrote(line: str) -> None:
    def seconds(count: int) -> float:
        began = time.process_time()
        named_cause([line] * count, "vllm")
        named_cause([line] * count, "llamacpp")
        return time.process_time() - began

    assert seconds(400) < 8 * max(seconds(100), 0.01)
