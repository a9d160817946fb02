"""The vLLM adapter: argv and environment of one ``vllm serve``, from one pool. Flags are those of vLLM 0.33.

vLLM divides every layer among its GPUs (tensor parallel) and takes a fraction of each, whatever the model needs: it is told
to keep to what the pool was promised. ``pools[].ctx`` is the total over all slots, so one request may use ctx / slots.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import ResolvedModel, Warmup
from pool_managerd.core.fit import DeviceFraction
from pool_managerd.core.reservations import Assignment
from pool_managerd.engines.environment import pool_env
from pool_managerd.engines.flags import Option, OptionTable, arrange, collapse
from pool_managerd.errors import NodeError, SpecError

FRACTION = 0.9
"""Of each GPU, where the pool sets no `vram_bytes`."""

_LEAST_FRACTION = 0.01
_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size"}
_OWN_FRACTION = 0.92
"""What vLLM 0.33 takes when it is not told."""

_SET_BY_DAEMON = {
    "--model": "pools[].model",
    "--host": "nothing: engines listen on 127.0.0.1 and are reached through the daemon",
    "--port": "pools[].provisioning.ports",
    "--max-num-seqs": "pools[].slots",
    "--max-model-len": "pools[].ctx",
    "--tensor-parallel-size": "pools[].tensor_split: auto",
    "--gpu-memory-utilization": "pools[].vram_bytes",
    "--served-model-name": "pools[].served_name",
}
_REFUSED = {
    "--api-key": "a key in a command line can be read by every user of this machine; the daemon guards the engine",
    "--trust-remote-code": "it runs code that came with the model",
    "--download-dir": "it lets the engine download models, past the policy and the digest check; use pools[].model",
    "--allowed-local-media-path": "it opens files of this machine to whoever reaches the engine",
    "--kv-cache-memory-bytes": "the engine would not keep to the memory that the pool was promised; use pools[].vram_bytes",
    "--cpu-offload-gb": "it keeps weights in main memory (GPU-only enforcement)",
    "--pipeline-parallel-size": "only tensor parallel is supported; use pools[].tensor_split: auto",
    "--data-parallel-size": "one engine is one replica; add a pool instead",
}
_VALUES = (
    "--attention-backend", "--block-size", "--dtype", "--kv-cache-dtype", "--limit-mm-per-prompt", "--max-cudagraph-capture-size",
    "--max-logprobs", "--max-num-batched-tokens", "--mm-processor-cache-gb", "--moe-backend", "--optimization-level",
    "--prefix-caching-hash-algo", "--quantization", "--reasoning-parser", "--scheduling-policy", "--seed", "--shutdown-timeout",
    "--stream-interval", "--tokenizer-mode", "--tool-call-parser",
)  # fmt: skip
_SWITCHES = (
    "--async-scheduling", "--disable-custom-all-reduce", "--enable-auto-tool-choice", "--enable-chunked-prefill",
    "--enable-expert-parallel", "--enable-prefix-caching", "--enforce-eager", "--language-model-only", "--trust-remote-code",
)  # fmt: skip
OPTIONS = OptionTable([
    *(Option((name,), values=1) for name in (*_VALUES, *_SET_BY_DAEMON, *_REFUSED) if name not in _SWITCHES),
    *(Option((name,), ("--no-" + name.removeprefix("--"),)) for name in _SWITCHES),
])  # fmt: skip
"""What a pool may write, and what it may not but is told why."""

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_ENV_REFUSED = re.compile(
    r"VLLM_(API_KEY|PORT|HOST_IP|PLUGINS|SERVER_DEV_MODE|ALLOW_INSECURE_SERIALIZATION|ALLOW_RUNTIME_LORA_UPDATING)"
)
_MAX_CONFIG_BYTES = 4 << 20
_SCORES = re.compile(r"ForSequenceClassification$")
_EMBEDS = re.compile(
    r"(?:\w*Bert\w*|XLMRoberta|Roberta|DistilBert|Gte(?:New)?|Qwen2|Qwen3|Llama\w*|Mistral|Gemma3Text|EmbeddingGemma)Model|BertForMaskedLM"
)
"""Architectures that vLLM serves as embedding models by itself."""

_INFO = re.compile(r"vllm-(\d[\w.+]*)\.dist-info")


def build_flags(pool: PoolConfig, model: ResolvedModel, port: int, assignment: Assignment | None) -> tuple[str, ...]:
    """argv items after the program. Deterministic. Raises SpecError for a flag that is unknown, malformed or not allowed."""
    chosen = collapse(OPTIONS.parse(pool.provisioning.flags))
    for use in chosen.values():
        OPTIONS.refuse(use, _SET_BY_DAEMON, _REFUSED)
    own = [("--host", "127.0.0.1"), ("--port", str(port)), ("--max-num-seqs", str(pool.slots))]
    if pool.ctx is not None:
        own.append(("--max-model-len", str(_request_ctx(pool))))
    if assignment is not None:
        own += [
            ("--tensor-parallel-size", str(len(assignment.devices))),
            ("--gpu-memory-utilization", f"{_utilization(pool.id, assignment):g}"),
        ]
    for name, value in own:
        use = OPTIONS.use(name, value)
        chosen[use.option.canonical] = use
    # The daemon's warm-up asks by the model's id, people by the name that the pool is served under.
    names = dict.fromkeys((pool.served_name or pool.id, model.id))
    return ("serve", model.local_path, *arrange(chosen.values()), "--served-model-name", *names)


def build_env(pool: PoolConfig) -> dict[str, str]:
    """The engine's environment additions: it downloads nothing and reports nothing home. Raises SpecError."""
    env = dict(pool_env(pool, dict.fromkeys(_ENVIRONMENT, "nothing: the engine works offline")))
    for name in env:
        if _ENV_REFUSED.fullmatch(name):
            raise SpecError(f"cannot set {name} in provisioning.env: it bypasses what the daemon sets", hint="remove it")
    return env | _ENVIRONMENT


def settings_of(pool: PoolConfig) -> DeviceFraction:
    """What decides how much memory it takes."""
    return DeviceFraction(FRACTION, 0 if pool.ctx is None else _request_ctx(pool))


def submitted_settings(flags: Sequence[str]) -> DeviceFraction:
    """The same of a command line that is run as it stands; what cannot be read there is vLLM's default."""
    pairs = [*pairwise(flags), *(flag.split("=", 1) for flag in flags if "=" in flag)]
    given = {name.replace("_", "-") if name.startswith("--") else name: value for name, value in pairs}

    for short, name in _SHORT.items():
        given.setdefault(name, given.get(short, ""))

    def number(name: str, default: float, most: float) -> float:
        found = re.fullmatch(r"\d{0,9}\.?\d{1,9}", given.get(name, ""))
        return float(found[0]) if found is not None and 0 < float(found[0]) <= most else default

    return DeviceFraction(
        number("--gpu-memory-utilization", _OWN_FRACTION, 1), int(number("--max-model-len", 0, 1 << 30)),
        math.prod(int(number(name, 1, 64)) for name in _SHORT.values()),
    )  # fmt: skip


def warmup_of(flags: Sequence[str], model_path: str) -> Warmup:
    """What the engine can be asked for first, by its flags and the architectures that config.json names."""
    uses = {use.name: use.values[-1:] for use in OPTIONS.parse(flags[2 : flags.index("--served-model-name")])}
    names = _config(model_path).get("architectures")
    architecture = next((name for name in names if isinstance(name, str)), "") if isinstance(names, list) else ""
    if _SCORES.search(architecture) or "classify" in uses.get("--convert", ()):
        return "rerank" if _SCORES.search(architecture) else "none"
    pools = uses.get("--runner") == ("pooling",) or uses.get("--convert") == ("embed",)
    return "embedding" if pools or _EMBEDS.fullmatch(architecture) else "completion"


def _config(folder: str) -> dict[str, Any]:
    """config.json of a model, {} where it cannot be read."""
    try:
        with (Path(folder) / "config.json").open("rb") as file:
            found = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_model(path: str) -> None:
    """Raises SpecError unless ``path`` is a folder as vLLM serves it."""
    if not (Path(path) / "config.json").is_file():
        raise SpecError(
            f"cannot use {path} with vLLM: it is no folder with a config.json", hint="name the folder of the safetensors model"
        )


def version_of(binary: Path) -> str:
    """From the package that the ``vllm`` command lies beside, without running it (that takes seconds)."""
    for info in sorted(binary.resolve().parent.parent.glob("lib/python3*/*-packages/vllm-*.dist-info")):
        found = _INFO.fullmatch(info.name)
        if found is not None:
            return f"vllm-{found[1]}"
    return "vllm-unknown"


def _request_ctx(pool: PoolConfig) -> int:
    return max(1, (pool.ctx or 0) // pool.slots)


def _utilization(pool_id: str, assignment: Assignment) -> float:
    """One figure for all GPUs, rounded down: the least of what each was promised. Raises NodeError for next to nothing."""
    least = min(assignment.bytes_by_device[d.uuid] / max(1, d.vram_total_bytes) for d in assignment.devices)
    rounded = math.floor(least * 1e4 + 1e-3) / 1e4
    if rounded < _LEAST_FRACTION:
        raise NodeError(
            f"cannot run vLLM in {rounded:.2%} of a GPU", code="INSUFFICIENT_VRAM", pool_id=pool_id,
            hint="free memory there, use another GPU, or raise vram_bytes",
        )  # fmt: skip
    return rounded
