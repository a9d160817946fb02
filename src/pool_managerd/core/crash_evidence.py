"""Which line of an engine's log names the cause of its end: rules as data, per kind of log, over the lines of one launch.

The last line hardly ever does: engines end with a farewell, a hint at their help, a debugger's or a resource tracker's
remarks. Lines are foreign text: each is looked at up to a fixed length, by patterns that take time linear in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pool_managerd.core.engines import ENGINES

MAX_LINE_CHARS = 2_000
MAX_EVIDENCE_CHARS = 300

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)|[ -/]{0,8}[0-~])|\x00+")
_PROGRESS = re.compile(r"\d ?%|\d/\d|\b(?:it/s|s/it)\b")
_ERROR_LEVEL = re.compile(r"\d+(?:\.\d+){1,5} E ")
_PREFIX = re.compile(
    r"E |\d+(?:\.\d+){1,5} [DIWE] |\(\w+ ?(?:rank=\d+ )?(?:pid=\d+)?\) (?:(?:ERROR|WARNING|INFO) [\d: -]+\[\S+\] )?"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Lines that may name a cause. Of several the first counts, or the last. A group is the part to quote."""

    pattern: re.Pattern[str]
    last: bool = False


def _any(*parts: str) -> re.Pattern[str]:
    return re.compile("|".join(parts))


_PARTING = _any(
    r"exiting due to", r"cleaning up before exit", r"to show complete usage, run with -h", r"^usage:", r"^\s+\(env: ",
    r"^\[(?:Inferior|New LWP|Thread )", r"detached\]", r"^Using host libthread_db", r"^#\d+\s", r"^0x[0-9a-f]+ in ",
    r"ptrace: ", r"^No stack\.", r"^The program (?:is|was) not", r"^warning: process \d+ is already traced",
    r"GGML_BACKTRACE", r"For bare-metal debugging|ggml-org/llama\.cpp/pull", r"core dumped",
    r"For further information visit", r"warnings\.warn\(", r"resource_tracker", r"See root cause above", r"See stack trace",
    r"^\s*\^+\s*$", r"^\s*~*\^+~*\s*$", r"The above exception was the direct cause", r"During handling of the above exception",
    r"\[pool-managerd: \d+ bytes of output were dropped here\]", r"^Traceback \(most recent call last\)", r"^\s+File \"",
    r"Set OMP_NUM_THREADS", r"destroy_process_group\(\) was not called", r"ProcessGroupNCCL",
    r"encountered an error while trying to fit params", r"pinned memory", r"please consider disabling jinja",
)  # fmt: skip
"""Never quoted: farewells, hints at a help, and what debuggers and interpreters say around an error."""

_NATIVE = (
    r"error while loading shared libraries: .+", r"CUDA error: .+", r"cudaMalloc failed.*", r"out of (?:device )?memory",
    r"OutOfDeviceMemory", r"GGML_ASSERT\(", r"^\s*what\(\):", r"Illegal instruction", r"symbol lookup error",
    r"version `\S+' not found", r"Fatal Python error", r"cannot open shared object file", r"failed to allocate (?!.*pinned)",
    r"unable to allocate", r"[Aa]ddress already in use", r"couldn't bind", r"GPU-only enforcement",
    r"CUDA driver version is insufficient", r"no kernel image is available", r"Exec format error", r"cannot execute binary",
)  # fmt: skip

_EXCEPTION = r"(?P<said>(?<![\w.])[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)(?:: .*|$))"
_PYTHON = (
    Rule(re.compile(_EXCEPTION), last=True),
    Rule(_any(r"(?:^|[^\w])error: .+", r"\bError: .+", r"\[ERROR\]|\bERROR\b"), last=True),
)

_LLAMACPP = (
    Rule(_any(
        r"error while handling argument", r"error: invalid argument", r"llamacpp_server: cannot (?!start the llama)",
        r"llamacpp_server: (?:unknown flag|the flag|GPU-only)", *_NATIVE,
    )),
    Rule(_any(
        r"error loading model: (?!llama_model_loader: failed to load model from)", r"invalid magic", r"failed to read magic",
        r"failed to open GGUF", r"V cache quantization requires", r"unknown model architecture", r"missing tensor",
        r"chat template is not supported", r"the argument has been removed",
    )),
    Rule(_any(r"^E (?!.*failed to (?:load|create|init)).+", r"^E .*(?:failed|error).*(?:No such file|Permission denied)")),
    Rule(_any(r"^E .+", r"error loading model", r"(?:^|\W)[Ee]rror\b.*")),
    Rule(_any(r"failed to \w+", r"cannot \w+", r"terminate called")),
)  # fmt: skip
_VLLM = (
    Rule(re.compile(rf"^(?:\((?:\w*Worker|EngineCore)[^)]{{0,80}}\) )?ERROR \d\d-\d\d [^\]]{{1,80}}\] {_EXCEPTION}")),
    Rule(re.compile(r"(?P<said>Value error, .+?)(?: \[type=value_error|$)")),
    Rule(_any(*_NATIVE, r"died unexpectedly")),
    *_PYTHON,
)
_OTHER = (Rule(_any(*_NATIVE)), *_PYTHON, *_LLAMACPP[1:])
_RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType({"llamacpp": (*_LLAMACPP, *_PYTHON), "vllm": _VLLM})
"""By what an engine calls its kind of log."""


def named_cause(lines: Sequence[str], engine: str) -> str:
    """The line of ``lines`` (one launch's log, oldest first) that names why ``engine`` ended, clean and short.

    Without any that is known to name a cause, the last one that is no parting line; "" when there is none.
    """
    kind = ENGINES.get(engine)
    rules = _RULES.get(kind.log if kind is not None else "", _OTHER)
    best, found = len(rules), ""
    for line in _said(lines):
        for rank, rule in enumerate(rules[: best + 1]):
            if rank == best and not rule.last:
                break  # the first at this rank stays
            seen = rule.pattern.search(line)
            if seen is not None and _PARTING.search(line) is None:
                best, found = rank, seen.groupdict().get("said") or line
                break
    if not found:
        found = next((line for line in _said(reversed(lines)) if line.strip() and _PARTING.search(line) is None), "")
    return _quoted(found)


def pieces(text: str) -> Iterator[str]:
    """The lines of raw output as a terminal would leave them: without colours, and of a progress bar its last state.

    A carriage return begins a new piece: an error that overwrites a progress bar is a line of its own.
    """
    for line in text.split("\n"):
        parts = [part for part in line.split("\r") if part.strip()]
        for number, part in enumerate(parts, 1):
            if number == len(parts) or _PROGRESS.search(part[:MAX_LINE_CHARS]) is None:
                yield _ESCAPES.sub("", part).rstrip()


def _said(lines: Iterable[str]) -> Iterator[str]:
    """Each piece, cut; of llama.cpp's stamp the level stays in front of those that are errors."""
    for line in lines:
        for piece in pieces(line[: 8 * MAX_LINE_CHARS]):
            text = piece[:MAX_LINE_CHARS]
            error = _ERROR_LEVEL.match(text)
            yield "E " + text[error.end() :] if error else text


def _quoted(line: str) -> str:
    prefix = _PREFIX.match(line)
    plain = " ".join(line[prefix.end() if prefix else 0 :].split())
    return plain if len(plain) <= MAX_EVIDENCE_CHARS else plain[: MAX_EVIDENCE_CHARS - 1] + "…"
