"""The flags of ``vllm serve``: which there are, which the daemon sets itself, and which it does not let through. Data.

``data/vllm_options.json`` is what ``vllm serve --help=all`` of vLLM 0.32 lists, read by `parse_argparse_help`. A pool's
flag that is not in it is looked up in the help of the pool's own engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pool_managerd.engines.flags import MANY, Option, OptionTable, recorded

SET_BY_DAEMON: Mapping[str, str] = MappingProxyType({
    "--model": "pools[].model",
    "--host": "nothing: engines listen on 127.0.0.1 and are reached through the daemon",
    "--port": "pools[].provisioning.ports",
    "--max-num-seqs": "pools[].slots",
    "--max-model-len": "pools[].ctx",
    "--tensor-parallel-size": "pools[].tensor_split: auto",
    "--gpu-memory-utilization": "pools[].vram_bytes",
    "--served-model-name": "pools[].served_name",
})  # fmt: skip

_KEY = "a key in a command line can be read by every user of this machine; the daemon guards the engine"
_PLAIN_HTTP = "the daemon speaks plain HTTP with the engine over loopback"
_CODE = "it runs code of your choice inside the engine"
_OTHERS = "it sends the model's work to other machines"
_REPLICA = "one engine is one replica; add a pool instead"
_DOWNLOAD = "it lets the engine download models, past the policy and the digest check; use pools[].model"
_RAM = "it keeps weights in RAM (GPU-only enforcement)"
_MEMORY = "the engine would not keep to the memory that is reserved for the pool; use pools[].vram_bytes"
_ELSEWHERE = "the daemon could not find the engine's health"
_FILES = "it opens files of this machine to whoever reaches the engine"
_LOG = "the engine's output belongs in the pool's own, bounded log"

REMOTE_CODE = "--trust-remote-code"
REFUSED: Mapping[str, str] = MappingProxyType({
    "--api-key": _KEY,
    "--hf-token": _KEY,
    REMOTE_CODE: "it runs code that came with the model (policy.allow_remote_code)",
    "--download-dir": _DOWNLOAD,
    "--allowed-local-media-path": _FILES,
    "--allowed-media-domains": "it lets requests make the engine fetch from other machines",
    "--tool-server": "it lets prompts act on other machines",
    "--kv-cache-memory-bytes": _MEMORY,
    "--num-gpu-blocks-override": _MEMORY,
    "--cpu-offload-gb": _RAM,
    "--cpu-offload-params": _RAM,
    "--offload-backend": _RAM,
    "--offload-group-size": _RAM,
    "--offload-num-in-group": _RAM,
    "--offload-params": _RAM,
    "--offload-prefetch-step": _RAM,
    "--kv-offloading-size": "it keeps the KV cache in RAM (GPU-only enforcement)",
    "--pipeline-parallel-size": "only tensor parallel is supported; use pools[].tensor_split: auto",
    "--prefill-context-parallel-size": "only tensor parallel is supported; use pools[].tensor_split: auto",
    "--device-ids": "the daemon chooses the GPUs; use pools[].devices",
    "--api-server-count": _REPLICA,
    "--headless": _REPLICA,
    "--enable-elastic-ep": _REPLICA,
    **{f"--data-parallel-{name}": _REPLICA for name in (
        "size", "size-local", "address", "backend", "rank", "rpc-port", "start-rank", "hybrid-lb", "external-lb",
        "multi-port-external-lb", "supervisor-port",
    )},
    **dict.fromkeys(("--nnodes", "--node-rank", "--master-addr", "--master-port", "--distributed-executor-backend"), _OTHERS),
    **dict.fromkeys(("--kv-transfer-config", "--ec-transfer-config", "--kv-events-config", "--otlp-traces-endpoint"), _OTHERS),
    "--weight-transfer-config": "it lets clients replace the model's weights",
    **dict.fromkeys(
        ("--middleware", "--logits-processors", "--io-processor-plugin", "--reasoning-parser-plugin", "--tool-parser-plugin",
         "--scheduler-cls", "--model-class-overrides"), _CODE,
    ),
    "--config": "it reads further flags from a file, past these rules; use provisioning.flags",
    **dict.fromkeys(("--uds", "--root-path", "--grpc", "--grpc-port", "--tokens-only"), _ELSEWHERE),
    **dict.fromkeys(
        ("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers", "--enable-ssl-refresh"),
        _PLAIN_HTTP,
    ),
    **dict.fromkeys(("--log-config-file", "--logging-config", "--profiler-config", "--mm-encoder-fp8-scale-save-path"), _LOG),
    "--help": "it prints something and ends",
})  # fmt: skip
"""Never allowed, in any profile."""

LISTS = frozenset({"--middleware"})
"""Every use counts."""

UNLISTED = frozenset({"--worker-cls", "--worker-extension-cls"})
"""Flags that name code to be run in every worker: as if the engine had them not."""

PATHS = frozenset({"--chat-template", "--tokenizer", "--generation-config", "--hf-config-path", "--lora-modules", "--spec-model"})
"""Flags whose value may be a path, which is relative to the configuration file."""

QUIET = ("--disable-access-log-for-endpoints", "/health,/metrics")
"""Keeps the daemon's own probes and looks at its counters out of the engine's log."""

SHUTDOWN = "--shutdown-timeout"
KNOWN_SINCE = (0, 30)
"""Versions from which on the two flags above exist for certain."""

_NAME = re.compile(r"--?[A-Za-z][\w-]*")
_SECTION = re.compile(r"  -")


def parse_argparse_help(text: str) -> tuple[tuple[Option, ...], dict[str, str]]:
    """The options of an argparse help, and further names by the one that each stands for."""
    options: list[Option] = []
    aliases: dict[str, str] = {}
    for line in text.splitlines():
        if _SECTION.match(line) is not None:
            option, others = _parse_line(line.strip())
            options.append(option)
            aliases |= dict.fromkeys(others, option.names[0])
    return tuple(options), aliases


def _parse_line(line: str) -> tuple[Option, list[str]]:
    """``--x X, -x X``, ``--x, --no-x``, ``--x {a,b}``, ``--x X [X ...]``, perhaps with the beginning of its description."""
    head = re.split(r" {2,}", line)[0]
    names: list[str] = []
    hints: list[str] = []
    for part in re.split(r", (?=-)", head):
        name, _, hint = part.partition(" ")
        if _NAME.fullmatch(name):
            names.append(name)
            hints.append(hint)
    hint = max(hints, key=len, default="")
    values = 0 if not hint else MANY if " ...]" in hint else 1
    first = next((name for name in names if name.startswith("--")), names[0])
    negated = tuple(name for name in names if name == "--no-" + first[2:])
    others = [name for name in names if name not in (first, *negated)]
    shorter = [name for name in others if len(name) < len(first)]
    return Option((first, *shorter), negated, values), [name for name in others if name not in shorter]


def table_of(options: Iterable[Option], aliases: Mapping[str, str]) -> OptionTable:
    """The options as a table: keys of a JSON value may be written behind a dot, as ``--compilation-config.mode 3``."""
    return OptionTable((option for option in options if UNLISTED.isdisjoint(option.names)), aliases, lists=LISTS, dotted=True)


def recorded_options() -> OptionTable:
    """The options of vLLM 0.32 as recorded in this package."""
    return table_of(*recorded("vllm_options.json"))
