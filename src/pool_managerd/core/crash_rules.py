"""Which lines of an engine's log name the cause of its end, and what they mean: rules as data, per kind of log.

The texts are those that the engines, their runtimes and the dynamic linker print. A class is given only where the line
leaves no doubt: a deterministic one keeps a pool down (`CrashClass.deterministic`). Patterns take time linear in the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_remedies import MEANINGS


@dataclass(frozen=True, slots=True)
class Rule:
    """Lines that may name a cause. ``crash`` None: which class it is, they do not say. Group ``said`` is the part to quote."""

    pattern: re.Pattern[str]
    crash: CrashClass | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Tier:
    """Rules of one rank. Of the lines that match one of them the first counts, or the ``last``."""

    rules: tuple[Rule, ...]
    last: bool = False

    def within(self, text: str) -> Tier:
        """With those rules alone that match anywhere in ``text``."""
        return replace(self, rules=tuple(rule for rule in self.rules if rule.pattern.search(text) is not None))


def _rule(pattern: str, crash: CrashClass | None = None, remedy: str = "") -> Rule:
    return Rule(re.compile(pattern, re.MULTILINE), crash, remedy or (MEANINGS[crash].remedy if crash is not None else ""))


def _lines(*patterns: str) -> tuple[Rule, ...]:
    """Lines worth quoting that tell no class."""
    return tuple(map(_rule, patterns))


PARTING = re.compile("|".join((
    r"exiting due to", r"cleaning up before exit", r"to show complete usage, run with -h", r"^usage:", r"^\s+\(env: ",
    r"^\[(?:Inferior|New LWP|Thread )", r"detached\]", r"^Using host libthread_db", r"^#\d+\s", r"^0x[0-9a-f]+ in ",
    r"ptrace: ", r"^No stack\.", r"^The program (?:is|was) not", r"^warning: process \d+ is already traced",
    r"GGML_BACKTRACE", r"For bare-metal debugging|ggml-org/llama\.cpp/pull", r"core dumped",
    r"For further information visit", r"warnings\.warn\(", r"resource_tracker", r"See root cause above", r"See stack trace",
    r"^\s*\^+\s*$", r"^\s*~*\^+~*\s*$", r"The above exception was the direct cause", r"During handling of the above exception",
    r"\[pool-managerd: \d+ bytes of output were dropped here\]", r"^Traceback \(most recent call last\)", r"^\s+File \"",
    r"Set OMP_NUM_THREADS", r"destroy_process_group\(\) was not called", r"ProcessGroupNCCL",
    r"encountered an error while trying to fit params", r"pinned memory", r"please consider disabling jinja",
    r"Received sigquit from a child proces", r"Compile with `?TORCH_USE_CUDA_DSA", r"CUDA_LAUNCH_BLOCKING",
    r"CUDA kernel errors might be asynchronously", r"creating server: Internal - failed to load all models",
    r"^(?:\(\w[^)]{0,80}\) )?(?:DEBUG|INFO|WARNING) \d\d-\d\d \d\d:(?!.*exited unexpectedly)",
)))  # fmt: skip
"""Never quoted: farewells, hints at a help, what debuggers and interpreters say around an error, what vLLM calls no error."""

_GPU = (
    _rule(r"uncorrectable ECC error", CrashClass.ECC),
    _rule(r"CUDA driver version is insufficient", CrashClass.DRIVER_MISMATCH),
    _rule(r"NVIDIA driver on your system is too old", CrashClass.DRIVER_MISMATCH),
    _rule(r"PTX was compiled with an unsupported toolchain", CrashClass.DRIVER_MISMATCH),
    _rule(r"[Dd]river/library version mismatch", CrashClass.DRIVER_MISMATCH, "reboot_or_reload_driver"),
    _rule(r"unsupported display driver / cuda driver combination", CrashClass.DRIVER_MISMATCH, "reboot_or_reload_driver"),
    _rule(r"Found no NVIDIA driver on your system", CrashClass.DRIVER_MISMATCH, "fix_driver_setup"),
    _rule(r"no CUDA-capable device is detected", CrashClass.CUDA, "fix_driver_setup"),
    _rule(r"no kernel image is available", CrashClass.CUDA, "use_gpu_build"),
    _rule(r"device kernel image is invalid", CrashClass.CUDA, "use_gpu_build"),
    _rule(r"no device code compatible with CUDA arch", CrashClass.CUDA, "use_gpu_build"),
    _rule(r"[Gg][Pp][Uu] is lost|fallen off the bus", CrashClass.DRIVER_RESET),
    _rule(r"CUDA (?:error: )?out of memory", CrashClass.VRAM_OOM),
    _rule(r"cudaMalloc failed", CrashClass.VRAM_OOM),
    _rule(r"OutOfDeviceMemory|out of device memory", CrashClass.VRAM_OOM),
    _rule(r"(?:failed to|unable to) allocate (?:CUDA|Vulkan|ROCm|SYCL|Metal)\d{0,3}\b", CrashClass.VRAM_OOM),
    _rule(r"CUBLAS_STATUS_ALLOC_FAILED", CrashClass.VRAM_OOM),
    _rule(r"NCCL error|ncclUnhandledCudaError", CrashClass.CUDA),
    _rule(r"CUDA error: .+|CUBLAS_STATUS_\w+|CUDA driver initialization failed", CrashClass.CUDA),
)
_LOADER = (
    _rule(r"error while loading shared libraries: .+", CrashClass.MISSING_LIBRARY),
    _rule(r"cannot open shared object file", CrashClass.MISSING_LIBRARY),
    _rule(r"symbol lookup error", CrashClass.MISSING_LIBRARY),
    _rule(r"version `\S+' not found", CrashClass.MISSING_LIBRARY),
    _rule(r"Exec format error|cannot execute binary", CrashClass.ILLEGAL_INSTRUCTION),
    _rule(r"Illegal instruction", CrashClass.ILLEGAL_INSTRUCTION),
    _rule(r"[Aa]ddress already in use", CrashClass.PORT_CONFLICT),
    _rule(r"Socket '[^']{1,200}' already in use", CrashClass.PORT_CONFLICT),
    _rule(r"couldn't bind", CrashClass.PORT_CONFLICT),
)
_NATIVE = (
    *_GPU, *_LOADER,
    *_lines(r"out of memory", r"GGML_ASSERT\(", r"^\s*what\(\):", r"Fatal Python error", r"failed to allocate (?!.*pinned)",
            r"unable to allocate", r"GPU-only enforcement"),
)  # fmt: skip

_EXCEPTION = r"(?P<said>(?<![\w.])[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)(?:: .*|$))"
_NO_FP8 = _rule(r"type fp8\w{1,20} not supported in this architecture", CrashClass.BAD_MODEL, "use_other_format")
"""Behind a Triton error that says where in its kernel, and not what."""
_PYTHON_MEANINGS = (
    _NO_FP8,
    _rule(r"Free memory on device .{0,80}is less than desired GPU memory utilization", CrashClass.VRAM_OOM, "stop_vram_users"),
    _rule(r"memory capacity is unbalanced", CrashClass.VRAM_OOM, "stop_vram_users"),
    # What is left for the cache is measured, other programs' memory included: a later start may find more.
    _rule(r"No available memory for the cache blocks", CrashClass.VRAM_OOM, "room_for_cache"),
    _rule(r"larger than the (?:available KV cache memory|maximum number of tokens that can be stored in KV cache)",
          CrashClass.VRAM_OOM, "room_for_cache"),
    _rule(r"is less than requested memory for kv \(", None, "lower_cache"),
    _rule(r"Not enough memory\. Please try to increase --mem-fraction-static", CrashClass.VRAM_OOM, "room_for_cache"),
    _rule(r"max_model_len \(\d+\) is greater than the derived max_model_len", CrashClass.BAD_FLAGS, "lower_context"),
    _rule(r"\berror: (?:unrecognized arguments|ambiguous option|argument [-\w/, ]{1,120}: |the following arguments are required)",
          CrashClass.BAD_FLAGS),
    _rule(r"Model architectures \[.{1,200}\] are not supported", CrashClass.BAD_MODEL,
          "use_newer_engine"),
    _rule(r"does not recognize this architecture", CrashClass.BAD_MODEL, "use_newer_engine"),
    _rule(r"[Ee]rror while deserializing header", CrashClass.BAD_MODEL),
    _rule(r"Cannot find any model weights with", CrashClass.BAD_MODEL),
    _rule(r"RuntimeError: weight \S{1,200} does not exist", CrashClass.BAD_MODEL),
    _rule(r"Attempted to load weight \(|Tried to load weights of size ", CrashClass.BAD_MODEL, "match_weights"),
    _rule(r"The (?:size of tensor a|expanded size of the tensor) \(\d{1,20}\) must match", CrashClass.BAD_MODEL, "match_weights"),
    _rule(r"Quantization scheme is not supported for |The quantization method \S{1,80} is not supported for the current GPU",
          CrashClass.BAD_MODEL, "use_other_format"),
    _rule(r"Couldn't instantiate the backend tokenizer", CrashClass.BAD_MODEL, "template_or_tokenizer"),
    _rule(r"Unrecognized model in \S{1,200}\. Should have a `model_type` key", CrashClass.BAD_MODEL),
    _rule(r"Cannot find the config file for \w+", CrashClass.BAD_FLAGS),
    _rule(r"Unknown quantization method: ", CrashClass.BAD_FLAGS),
    _rule(r"ModuleNotFoundError: No module named", CrashClass.MISSING_LIBRARY),
    _rule(r"PermissionError: \[Errno 13\]", CrashClass.PERMISSION),
    _rule(r"\bCUDA error\b", CrashClass.CUDA),
    _rule(r"Watchdog (?:caught collective operation )?timeout", CrashClass.HUNG),
    _rule(r"(?:Worker proc|scheduler is) \S{0,80} ?d(?:ied unexpectedly|ead)|scheduler is dead", None, "look_at_worker"),
    _rule(r"engine core exited unexpectedly", None, "look_at_worker"),
)  # fmt: skip
_PYTHON = (
    Tier((_rule(_EXCEPTION),), last=True),
    Tier(_lines(r"(?:^|[^\w])error: .+", r"\bError: .+", r"\[ERROR\]|\bERROR\b"), last=True),
)

_GGUF = (
    _rule(r"unknown model architecture", CrashClass.BAD_MODEL, "use_newer_engine"),
    _rule(r"unknown pre-tokenizer type", CrashClass.BAD_MODEL, "use_newer_engine"),
    _rule(r"missing tensor", CrashClass.BAD_MODEL),
    _rule(r"wrong number of tensors", CrashClass.BAD_MODEL),
    _rule(r"data is not within the file bounds", CrashClass.BAD_MODEL),
    _rule(r"invalid magic", CrashClass.BAD_MODEL),
    _rule(r"failed to read magic", CrashClass.BAD_MODEL),
    _rule(r"error loading model: .*(?:key not found in model|has wrong shape)", CrashClass.BAD_MODEL),
    _rule(r"failed to open GGUF.*No such file", None, "put_model_back"),
    _rule(r"failed to open GGUF.*Permission denied", CrashClass.PERMISSION),
)
_LLAMACPP = (
    Tier((
        _rule(r"error while handling argument", CrashClass.BAD_FLAGS),
        _rule(r"error: invalid argument", CrashClass.BAD_FLAGS),
        _rule(r"llamacpp_server: (?:unknown flag|the flag|cannot use '.{0,200}?' for -)", CrashClass.BAD_FLAGS),
        _rule(r"llamacpp_server: cannot (?:import|load) xllamacpp", CrashClass.MISSING_LIBRARY),
        *_NATIVE,
        *_lines(r"llamacpp_server: cannot (?!start the llama)", r"llamacpp_server: GPU-only"),
    )),
    Tier((
        _rule(r"\bCUDA error\b", CrashClass.CUDA),
        _rule(r"V cache quantization requires", CrashClass.BAD_FLAGS),
        _rule(r"the argument has been removed", CrashClass.BAD_FLAGS),
        _rule(r"chat template is not supported", CrashClass.BAD_FLAGS),
        *_GGUF,
        *_lines(r"error loading model: (?!llama_model_loader: failed to load model from)", r"failed to open GGUF"),
    )),
    Tier((
        _rule(r"^E .*Permission denied", CrashClass.PERMISSION),
        *_lines(r"^E (?!.*failed to (?:load|create|init)).+", r"^E .*(?:failed|error).*(?:No such file|Permission denied)"),
    )),
    Tier(_lines(r"^E .+", r"error loading model", r"(?:^|\W)[Ee]rror\b.*")),
    Tier(_lines(r"failed to \w+", r"cannot \w+", r"terminate called")),
)  # fmt: skip
_WORKER = r"^(?:\((?:\w*Worker|EngineCore)[^)]{0,80}\) )?ERROR \d\d-\d\d [^\]]{1,80}\] "
_VLLM = (
    Tier((_NO_FP8,)),
    Tier((_rule(_WORKER + _EXCEPTION),)),
    Tier((_rule(r"(?P<said>Value error, .+?)(?: \[type=value_error|$)"),)),
    Tier((*_NATIVE, _rule(r"(?:died|exited) unexpectedly", None, "look_at_worker"))),
    *_PYTHON,
)
_TRITON = (
    _rule(r"failed to load '[^']{1,200}' version \d+: Invalid argument: .+", CrashClass.BAD_MODEL),
    _rule(r"Poll failed for model directory '[^']{1,200}': .+", CrashClass.BAD_MODEL),
    _rule(r"tritonserver: unrecognized option", CrashClass.BAD_FLAGS),
)
_OTHER = (Tier((*_NATIVE, *_TRITON, *_PYTHON_MEANINGS)), *_PYTHON, *_LLAMACPP[1:])
_TIERS: Mapping[str, tuple[Tier, ...]] = MappingProxyType({"llamacpp": (*_LLAMACPP, *_PYTHON), "vllm": _VLLM})
"""By what an engine calls its kind of log; ``_OTHER`` for any program."""
_MEANINGS: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    {"llamacpp": (*_LLAMACPP[0].rules, *_LLAMACPP[1].rules, *_LLAMACPP[2].rules), "vllm": (*_GPU, *_PYTHON_MEANINGS, *_LOADER)}
)


def tiers_of(log: str) -> tuple[Tier, ...]:
    """What names a cause in this kind of log, the best first."""
    return _TIERS.get(log, _OTHER)


def meanings_of(log: str) -> Iterator[Rule]:
    """The rules of this kind of log that say what a line means, the surest first."""
    found = _MEANINGS.get(log, (*_GPU, *_TRITON, *_PYTHON_MEANINGS, *_LOADER, *_LLAMACPP[0].rules, *_GGUF))
    return (rule for rule in found if rule.crash is not None or rule.remedy)


def all_meanings() -> tuple[Rule, ...]:
    """Every rule that says what a line means, once."""
    return tuple(dict.fromkeys(rule for log in ("llamacpp", "vllm", "") for rule in meanings_of(log)))
