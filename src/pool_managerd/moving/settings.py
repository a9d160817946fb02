"""What a model says beside its command: times, what lists show, timeouts, variables."""

from __future__ import annotations

from typing import Any

from pool_managerd.config.parse import KeyPath
from pool_managerd.moving.report import Findings
from pool_managerd.moving.source import Source

MAX_TTL_MS = 30 * 86_400_000
_CONNECTION = ("connect", "keepalive", "tlsHandshake", "expectContinue", "idleConn")


def times(source: Source, model: str, fields: dict[str, Any], external: bool, findings: Findings) -> None:
    """``ttl`` and ``unloadTimeout``."""
    at: KeyPath = ("models", model, "ttl")
    everywhere, ttl = source.whole(("globalTTL",), 0), source.whole(at, -1)
    if ttl < -1:
        raise source.wrong(at, f"cannot use {ttl}: it must be -1 or more")
    if ttl in (-1, everywhere):
        findings.usual(at, "it is what globalTTL says")
    elif external:
        findings.dropped(at, "whoever starts the program stops it")
    else:
        fields["idle_ttl_ms"] = idle_ttl_ms(ttl)
        findings.mapped(at, "pools[].idle_ttl_ms", "30 days are the most" if ttl * 1_000 > MAX_TTL_MS else "")
    at = ("models", model, "unloadTimeout")
    if source.whole(at, 0) > 0:
        findings.mapped(at, "supervision.stop_grace_ms", "one for all pools: the longest")
    elif source.whole(at, 0) < 0:
        raise source.wrong(at, "cannot use it: it must be 0 or more")
    else:
        findings.usual(at, "it is what the file's unloadTimeout says")


def idle_ttl_ms(seconds: int) -> int:
    return min(seconds * 1_000, MAX_TTL_MS)


def rest(source: Source, path: KeyPath, findings: Findings) -> None:
    """What lists show, timeouts, compatibility and macros of a model."""
    findings.usual((*path, "compat"), "web sockets load nothing here")
    findings.usual((*path, "healthCheckTimeout"), "llama-swap goes by that of the file alone")
    timeouts = source.mapping((*path, "timeouts"))
    findings.opened((*path, "timeouts"))
    for key in _CONNECTION:
        findings.usual((*path, "timeouts", key), "engines are on this machine")
    if timeouts.get("responseHeader"):
        why = "an engine that does nothing is ended by health.stall_ms; one that works is not"
        findings.dropped((*path, "timeouts", "responseHeader"), why)
    findings.usual((*path, "timeouts", "responseHeader"), "there is no such limit here either")
    for key, given in (("timeouts", timeouts), ("macros", source.mapping((*path, "macros")))):
        if not given:
            findings.usual((*path, key), "it is empty")
        elif key == "macros":
            for name in given:
                findings.mapped((*path, key, name), "", "its value stands where it was used")


def variable(engine: str, name: str, value: str) -> tuple[str, str] | None:
    """What becomes of a variable that the daemon does not let a pool have."""
    if name == "CUDA_DEVICE_ORDER":
        usual = value == "PCI_BUS_ID"
        return ("needless", "GPUs are always counted so") if usual else ("dropped", "GPUs are in PCI order: check `devices`")
    if engine == "llamacpp" and name.startswith(("LLAMA_ARG_", "LLAMA_API_KEY")):
        return "dropped", "write it as a flag into provisioning.flags, or as a key of the pool"
    if engine == "llamacpp" and name == "GGML_CUDA_ENABLE_UNIFIED_MEMORY":
        return "dropped", "it lets weights spill into RAM; with `profile: dev` it is allowed"
    if engine == "vllm" and name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS"):
        return "needless", "the engine works offline"
    if engine == "vllm" and name in ("VLLM_API_KEY", "VLLM_PORT", "VLLM_HOST_IP", "VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE"):
        return "dropped", "it bypasses what the daemon sets"
    return None
