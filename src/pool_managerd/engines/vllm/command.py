"""Argv and environment of one ``vllm serve``, from one pool. Its flags are in `flags`.

vLLM divides every layer among its GPUs (tensor parallel) and takes a fraction of each, whatever the model needs: it is told
to keep to what was reserved for the pool. ``pools[].ctx`` is the total over all slots, so one request may use ctx / slots.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pool_managerd.config import PoolConfig, path_from
from pool_managerd.core.artifacts import ResolvedModel, Warmup
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.memory.estimate import DeviceFraction
from pool_managerd.engines.environment import pool_env
from pool_managerd.engines.flags import FlagUse, OptionTable, arrange, attempt, collapse
from pool_managerd.engines.vllm.flags import (
    KNOWN_SINCE,
    PATHS,
    QUIET,
    REFUSED,
    REMOTE_CODE,
    SET_BY_DAEMON,
    SHUTDOWN,
    recorded_options,
)
from pool_managerd.errors import NodeError, PoolError, SpecError

FRACTION = 0.9
"""Of each GPU, where the pool sets no `vram_bytes`."""

_LEAST_FRACTION = 0.01
_END_MS = 500
"""Of the time that a stop gives, what the engine has to end in once its requests have."""

_CTX_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size"}
_OWN_FRACTION = 0.92
"""What vLLM 0.33 takes when it is not told."""

OPTIONS = recorded_options()
"""What a pool may write, and what it may not but is told why; a version that has further flags is asked for them."""

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


@dataclass(frozen=True, slots=True)
class Around:
    """What the adapter must know beside the pool. ``base_dir`` is the configuration's directory, ``grace_ms`` what a stop gives
    the engine, ``version`` its own where it is known, ``remote_code`` whether the policy lets it run what came with the model.
    """

    options: OptionTable = OPTIONS
    base_dir: Path = Path()
    grace_ms: int = 0
    version: tuple[int, ...] = ()
    remote_code: bool = False


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as vLLM serves it: ``config`` is what its config.json holds."""

    path: str
    config: Mapping[str, Any] = field(default_factory=dict)


def checked_flags(pool: PoolConfig, around: Around) -> tuple[dict[str, FlagUse], tuple[PoolError, ...]]:
    """The pool's own flags by option, and all that is wrong with them: flags that are unknown, malformed or not allowed."""
    table = around.options
    uses, wrong = table.sift(pool.provisioning.flags)
    chosen, problems = collapse(uses), list[PoolError](wrong)
    refused = {name: why for name, why in REFUSED.items() if name != REMOTE_CODE or not around.remote_code}
    for use in chosen.values():
        problems += attempt(partial(table.refuse, use, SET_BY_DAEMON, refused))
    for name in PATHS:
        if name in table and (found := chosen.get(table.use(name).option.canonical)):
            values = (_absolute(value, around.base_dir) for value in found.values)
            chosen[found.option.canonical] = table.use(found.name, *values)
    return chosen, tuple(problems)


def build_flags(
    pool: PoolConfig,
    own: Mapping[str, FlagUse],
    model: ResolvedModel,
    port: int,
    allocation: Allocation | None,
    around: Around,
) -> tuple[str, ...]:
    """argv items after the program: the pool's ``own`` flags and those the daemon sets. Deterministic.

    Raises NodeError for GPUs of which next to nothing was reserved.
    """
    table, chosen = around.options, dict(own)
    given = [("--host", "127.0.0.1"), ("--port", str(port)), ("--max-num-seqs", str(pool.slots))]
    if pool.ctx is not None:
        given.append(("--max-model-len", str(_request_ctx(pool))))
    if allocation is not None:
        given += [
            ("--tensor-parallel-size", str(len(allocation.devices))),
            ("--gpu-memory-utilization", f"{_utilization(pool.id, allocation):g}"),
        ]
    for name, value in given:
        use = table.use(name, value)
        chosen[use.option.canonical] = use
    for name, value in _defaults(around):
        use = table.use(name, value)
        chosen.setdefault(use.option.canonical, use)
    # The daemon's warm-up asks by the model's id, people by the name that the pool is served under.
    names = dict.fromkeys((pool.served_name or pool.id, model.id))
    return ("serve", model.local_path, *arrange(chosen.values()), "--served-model-name", *names)


def _defaults(around: Around) -> Iterator[tuple[str, str]]:
    """Probes stay out of the log, and running requests may end within the time that a stop gives; the pool may say otherwise."""
    if around.version < KNOWN_SINCE:
        return
    yield QUIET
    seconds = (around.grace_ms - _END_MS) // 1_000
    if seconds >= 1:
        yield SHUTDOWN, str(seconds)


def _absolute(text: str, base_dir: Path) -> str:
    """A path relative to the configuration file as an absolute one; what names no file there stays as it is."""
    name, equals, value = text.partition("=")
    path, before = (value, f"{name}=") if equals and not text.startswith(("{", "/", ".")) else (text, "")
    if not path or len(path) > 1_024 or path.startswith(("{", "[")) or "\n" in path:
        return text
    whole = path_from(base_dir, path)
    try:
        return f"{before}{os.path.normpath(whole)}" if whole.exists() else text
    except OSError:
        return text


def check_ctx(pool: PoolConfig, model: ModelFolder) -> None:
    """Raises SpecError when one request's context is longer than config.json lets the engine serve."""
    flags = " ".join(pool.provisioning.flags).replace("_", "-")
    told = pool.provisioning.env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").strip().lower()
    if pool.ctx is None or told not in ("", "0", "false") or "--hf-overrides" in flags or "--hf-config-path" in flags:
        return
    longest = _longest_ctx(model.config)
    if longest is not None and _request_ctx(pool) > longest:
        slots = f" ({pool.ctx} over {pool.slots} slots)" if pool.slots > 1 else ""
        raise SpecError(
            f"cannot serve {_request_ctx(pool)} tokens of context{slots}: config.json of {model.path} says {longest} at most",
            hint=f"set ctx to {longest * pool.slots} or less, or scale its positions with --hf-overrides, or set"
            " VLLM_ALLOW_LONG_MAX_MODEL_LEN: '1' in provisioning.env",
        )


def _longest_ctx(config: Mapping[str, Any]) -> int | None:
    """The least of the lengths that config.json gives, as vLLM derives it, scaled where it says so; None where it gives none."""
    text = config.get("text_config")
    facts = {**config, **text} if isinstance(text, dict) else config
    given = [value for key in _CTX_KEYS if isinstance(value := facts.get(key), int) and not isinstance(value, bool) and value > 0]
    if not given:
        return None
    longest = scaled = min(given)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = facts.get(key)
        # Layers of several kinds may have a scaling each; the most generous reading refuses nothing that would run.
        parts = (scaling, *(part for part in scaling.values() if isinstance(part, dict))) if isinstance(scaling, dict) else ()
        for part in parts:
            factor, original = part.get("factor"), part.get("original_max_position_embeddings")
            if isinstance(factor, int | float) and 1 < factor < 1e4:
                scaled = max(scaled, int(factor * longest), int(factor * original) if isinstance(original, int) else 0)
    longest = scaled
    further = facts.get("model_max_length")
    return max(longest, further) if isinstance(further, int) and not isinstance(further, bool) else longest


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
    given.setdefault("--gpu-memory-utilization", given.get("--device-memory-utilization", ""))
    for short, name in _SHORT.items():
        given.setdefault(name, given.get(short, ""))

    def number(name: str, default: float, most: float) -> float:
        found = re.fullmatch(r"\d{0,9}\.?\d{1,9}", given.get(name, ""))
        return float(found[0]) if found is not None and 0 < float(found[0]) <= most else default

    return DeviceFraction(
        number("--gpu-memory-utilization", _OWN_FRACTION, 1), int(number("--max-model-len", 0, 1 << 30)),
        math.prod(int(number(name, 1, 64)) for name in _SHORT.values()),
    )  # fmt: skip


def warmup_of(own: Mapping[str, FlagUse], model: ModelFolder) -> Warmup:
    """What the engine can be asked for first, by the pool's own flags and the architectures that config.json names."""
    uses = {use.name: use.values[-1:] for use in own.values()}
    names = model.config.get("architectures")
    architecture = next((name for name in names if isinstance(name, str)), "") if isinstance(names, list) else ""
    if _SCORES.search(architecture) or "classify" in uses.get("--convert", ()):
        return "rerank" if _SCORES.search(architecture) else "none"
    pools = uses.get("--runner") == ("pooling",) or uses.get("--convert") == ("embed",)
    return "embedding" if pools or _EMBEDS.fullmatch(architecture) else "completion"


def read_model(path: str) -> ModelFolder:
    """The model at ``path``, whose config.json counts as empty where it cannot be understood.

    Raises SpecError unless it is a folder as vLLM serves it.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise SpecError(
            f"cannot use {path} with vLLM: it is no folder with a config.json", hint="name the folder of the safetensors model"
        )
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        found = {}
    return ModelFolder(path, found if isinstance(found, dict) else {})


def version_of(binary: Path) -> str:
    """From the package that the ``vllm`` command lies beside, without running it (that takes seconds)."""
    for info in sorted(binary.resolve().parent.parent.glob("lib/python3*/*-packages/vllm-*.dist-info")):
        found = _INFO.fullmatch(info.name)
        if found is not None:
            return f"vllm-{found[1]}"
    return "vllm-unknown"


def numbers_of(version: str) -> tuple[int, ...]:
    """``vllm-0.32.0+cpu`` as (0, 32); () where it tells none."""
    found = re.match(r"vllm-(\d{1,4})\.(\d{1,4})", version)
    return (int(found[1]), int(found[2])) if found else ()


def _request_ctx(pool: PoolConfig) -> int:
    return max(1, (pool.ctx or 0) // pool.slots)


def _utilization(pool_id: str, allocation: Allocation) -> float:
    """One figure for all GPUs, rounded down: the least of what was reserved on each. Raises NodeError for next to nothing."""
    least = min(allocation.bytes_by_device[d.uuid] / max(1, d.vram_total_bytes) for d in allocation.devices)
    rounded = math.floor(least * 1e4 + 1e-3) / 1e4
    if rounded < _LEAST_FRACTION:
        raise NodeError(
            f"cannot run vLLM in {rounded:.2%} of a GPU", code="INSUFFICIENT_VRAM", pool_id=pool_id,
            hint="free memory there, use another GPU, or raise vram_bytes",
        )  # fmt: skip
    return rounded
