"""Which llama-server flags a configuration may not set, and why. Data; read by the llama.cpp adapter.

Names are canonical spellings or any synonym: a rule holds for every name of its option. Rules about options that a
binary does not have are idle.
"""

from __future__ import annotations

OWNED: dict[str, str] = {
    "--model": "pools[].model",
    "--host": "nothing: engines listen on 127.0.0.1 and are reached through the daemon",
    "--port": "pools[].provisioning.ports",
    "--parallel": "pools[].slots",
    "--ctx-size": "pools[].ctx",
    "--tensor-split": "pools[].tensor_split",
}
"""Flags the daemon sets itself, and the configuration key to use instead."""

_DOWNLOAD = "it lets the engine download models, past the policy and the digest check; use pools[].model"
_FILES = "it opens files of this machine to whoever reaches the engine"
_TOOLS = "it lets prompts act on this machine"
_ROUTER = "one engine serves one pool's model; add a pool instead"
_ENDS = "it prints something and ends"

REFUSED: dict[str, str] = {
    "--api-key": "a key in a command line can be read by every user of this machine; the daemon guards the engine",
    "--api-key-file": "the daemon probes the engine without a key, and guards it itself",
    "--ssl-key-file": "the daemon speaks plain HTTP with the engine over loopback",
    "--ssl-cert-file": "the daemon speaks plain HTTP with the engine over loopback",
    "--path": _FILES,
    "--media-path": _FILES,
    "--slot-save-path": "the daemon saves slots itself, each pool's in a directory of its own; see slot_cache",
    "--log-file": "the engine's output belongs in the pool's own, bounded log",
    "--log-prompts-dir": "it writes every prompt to disk",
    "--props": "it lets any client change the engine's settings behind the daemon's back",
    "--tools": _TOOLS,
    "--agent": _TOOLS,
    "--ui-mcp-proxy": _TOOLS,
    "--rpc": "it sends the model's work to other machines",
    "--reuse-port": "two engines could then answer on one port",
    "--api-prefix": "the daemon could not find the engine's health",
    "--models-dir": _ROUTER,
    "--models-preset": _ROUTER,
    "--models-max": _ROUTER,
    "--models-autoload": _ROUTER,
    "--model-url": _DOWNLOAD,
    "--docker-repo": _DOWNLOAD,
    "--hf-repo": _DOWNLOAD,
    "--hf-file": _DOWNLOAD,
    "--hf-repo-v": _DOWNLOAD,
    "--hf-file-v": _DOWNLOAD,
    "--hf-token": "a token in a command line can be read by every user of this machine",
    "--hf-repo-draft": _DOWNLOAD,
    "--mmproj-url": _DOWNLOAD,
    "--lora-scaled": "only --lora, with files beside the model, is supported",
    "--control-vector-scaled": "only --control-vector, with files beside the model, is supported",
    "--ui-config-file": _FILES,
    "--lookup-cache-dynamic": "it writes a file; engines write only in their own working directory",
    "--help": _ENDS,
    "--version": _ENDS,
    "--cache-list": _ENDS,
    "--list-devices": _ENDS,
    "--completion-bash": _ENDS,
}
"""Never allowed, in any profile (FAULTS I7)."""

REFUSED_PATTERN = (r"--[\w.-]+-(default|spec)", _DOWNLOAD)
"""Presets such as ``--gpt-oss-20b-default`` fetch weights; only ``--spec-default`` does not."""

LISTS = frozenset({
    "--lora", "--lora-scaled", "--control-vector", "--control-vector-scaled", "--override-kv", "--override-tensor",
    "--override-tensor-draft", "--spec-draft-override-tensor", "--logit-bias", "--dry-sequence-breaker", "--reverse-prompt",
    "--alias",
})  # fmt: skip
"""Options of which every use counts. Of others the last one does."""

FILES: tuple[str, ...] = (
    "--mmproj",
    "--model-draft",
    "--model-vocoder",
    "--lora",
    "--control-vector",
    "--chat-template-file",
    "--grammar-file",
    "--json-schema-file",
    "--lookup-cache-static",
)
"""Flags whose value is a file (or a list with commas): only beside the model or under the configuration's directory."""

ON_CPU: dict[str, str] = {
    "--no-kv-offload": "it keeps the KV cache in RAM",
    "--no-mmproj-offload": "it runs the projector on the CPU",
    "--cpu-moe": "it keeps experts in RAM",
    "--n-cpu-moe": "it keeps experts in RAM",
    "--cpu-moe-draft": "it keeps experts of the draft model in RAM",
    "--n-cpu-moe-draft": "it keeps experts of the draft model in RAM",
}
"""Flags that put work or weights on the CPU: refused outside profile dev (SPEC §20 no. 37)."""

DEVICES = ("--device", "--spec-draft-device")
GPU_CHOICE: dict[str, tuple[str, str]] = {
    "--device": ("none|cpu", "[a-z]+0"),
    "--spec-draft-device": ("none", "[a-z]+0"),
    "--main-gpu": ("0", "0"),
    "--split-mode": ("layer", "none|layer|row|tensor"),
}
"""Flags that choose or divide GPUs otherwise than is reserved: values that never do, and those that do not with one GPU."""

PLACES = r"cpu\w*|\w+_host"
PLACES_WITH_ONE = rf"{PLACES}|[a-z]+0(?:_\w+)?"
"""Where rules on tensors may put them: into RAM, which is counted, or on the only GPU."""

TENSOR_PLACES = ("--override-tensor", "--override-tensor-draft")
LAYERS = ("--n-gpu-layers", "--n-gpu-layers-draft")
ALL_LAYERS = 999
"""More layers than any model has: everything on the GPU."""
CLEARLY_ALL = 99
"""From here on a number of layers is how people write "all"."""

ENV_REFUSED_ON_GPU = {"GGML_CUDA_ENABLE_UNIFIED_MEMORY": "it lets weights spill into RAM"}
ENV_FLAG_PREFIXES = ("LLAMA_ARG_", "LLAMA_API_KEY")
"""llama.cpp reads flags from these too, which would pass by every rule here."""
