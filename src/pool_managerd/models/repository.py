"""Which files of a repository an engine needs that serves it as a folder: the weights once, what describes them, and no code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.fetch_rules import denied
from pool_managerd.models.hub import HubFile, HubListing
from pool_managerd.models.refs import ModelRef

MAX_FILES = 2_048
MAX_BESIDE = 256
MAX_BESIDE_BYTES = 64 << 20
MAX_CONFIG_BYTES = 4 << 20
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.(?:safetensors|bin)")
_BESIDE = re.compile(r".+\.(?:json|jinja|model|tiktoken|txt|vocab|bpe)", re.IGNORECASE)
_MODULE = re.compile(r"(?:\d{1,2}_\w{1,32}/[\w.-]+\.(?:json|safetensors)|(?:additional_)?chat_templates/[\w.-]+\.jinja)")
"""Of sentence transformers, whose layers after the model have folders of their own; and further chat templates."""
_NOT_BESIDE = re.compile(
    r"(?:trainer_state|training_args|all_results|eval_results|train_results)\b.*|(?:LICENSE|NOTICE|USE_POLICY).*"
)
_GGUF = re.compile(r"(?:.*/)?(?!mmproj)[^/]+\.gguf", re.IGNORECASE)
_TRAINING = re.compile(r"(?:training_args|optimizer|scheduler|rng_state|scaler)\b.*", re.IGNORECASE)
_PICKLE = re.compile(r".+\.(?:bin|pt|pth|ckpt|pkl|pickle)", re.IGNORECASE)


def is_code(path: str) -> bool:
    return path.endswith(".py")


def needed_files(model: ModelRef, listing: HubListing, policy: PolicyConfig) -> tuple[list[HubFile], list[HubFile]]:
    """Its weights, and what is beside them. Raises SpecError for what is no model, too large, or against the policy."""
    weights = _weights([file for file in listing.files if "/" not in file.path], ".safetensors")
    if not weights:
        weights = _pickles(model, listing, policy)
    beside = [file for file in listing.files if _is_beside(file.path, policy)]
    if any(file.path.endswith(".bin") for file in weights):
        beside = [file for file in beside if file.path != INDEX]
    else:
        beside = [file for file in beside if not file.path.endswith(".bin.index.json")]
    if len(weights) > MAX_FILES or len(beside) > MAX_BESIDE:
        raise _no_model(model, f"it has {len(weights)} files of weights and {len(beside)} beside them", listing)
    if CONFIG not in {file.path for file in beside}:
        raise _no_model(model, f"there is no {CONFIG} in it", listing)
    for file in beside:
        if file.size is None or file.size > MAX_BESIDE_BYTES:
            raise _no_model(model, f"{file.path} is larger than {MAX_BESIDE_BYTES >> 20} MiB", listing)
    return sorted(weights, key=lambda file: file.path), sorted(beside, key=lambda file: file.path)


def check_code(model: ModelRef, name: str, content: bytes, policy: PolicyConfig) -> None:
    """Whether a file of settings names code that would be run. Raises SpecError."""
    if not may_name_code(name) or policy.allow_remote_code:
        return
    modules: set[str] = set()
    if len(content) > MAX_CONFIG_BYTES:
        modules = {"nobody knows what"}
    else:
        try:
            json.loads(content, object_pairs_hook=partial(_collect, modules))
        except ValueError:  # what cannot be read names nothing
            pass
        except RecursionError:
            modules.add("nobody knows what")
    if modules:
        raise denied(
            model.id, f"its {name} has {', '.join(sorted(modules)[:5])} run when the model is loaded (auto_map)",
            "use a repository without code of its own, or read that code and set policy.allow_remote_code: true",
        )  # fmt: skip


def may_name_code(name: str) -> bool:
    """Whether a file can name code of the repository which is run when the model is loaded."""
    return name.endswith("config.json")


def _collect(modules: set[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of each object, wherever it is: what its ``auto_map`` names."""
    for key, value in pairs:
        if key == "auto_map" and value:
            classes = value.values() if isinstance(value, dict) else [value]
            texts = [text for one in classes for text in (one if isinstance(one, list) else [one]) if isinstance(text, str)]
            modules |= {f"{text.rpartition('--')[2].partition('.')[0][:80]}.py" for text in texts} or {"code"}
    return dict(pairs)


def _is_beside(path: str, policy: PolicyConfig) -> bool:
    if is_code(path):
        return policy.allow_remote_code and "/" not in path
    if _MODULE.fullmatch(path):
        return True
    return "/" not in path and bool(_BESIDE.fullmatch(path)) and not _NOT_BESIDE.fullmatch(path)


def _weights(files: Sequence[HubFile], suffix: str) -> list[HubFile]:
    """The model once: in parts as its index has it, else in one piece; some repositories carry it several times."""
    found = [file for file in files if file.path.endswith(suffix)]
    for wanted in ("model", "pytorch_model"):
        parts = [file for file in found if (shard := _SHARD.fullmatch(file.path)) is not None and shard["stem"] == wanted]
        whole = [file for file in found if file.path == f"{wanted}{suffix}"]
        if parts or whole:
            return parts or whole
    return [file for file in found if not file.path.startswith(("consolidated", "adapter_"))] or found


def _pickles(model: ModelRef, listing: HubListing, policy: PolicyConfig) -> list[HubFile]:
    """Weights that run code of their author's choice when they are loaded. Raises SpecError unless the policy allows them."""
    top = [file for file in listing.files if "/" not in file.path]
    found = [file for file in top if _PICKLE.fullmatch(file.path) and not _TRAINING.fullmatch(file.path)]
    if not found:
        raise _no_model(model, "there are no safetensors weights in it", listing)
    if not policy.allow_pickle:
        raise denied(
            model.id, f"its weights are pickles ({found[0].path}), which run code of their author's choice when they are loaded",
            "use a repository with safetensors weights, or set policy.allow_pickle: true",
        )  # fmt: skip
    return _weights(found, ".bin") or found


def _no_model(model: ModelRef, why: str, listing: HubListing) -> SpecError:
    ggufs = sorted(file.path for file in listing.files if _GGUF.fullmatch(file.path))
    names = ggufs or sorted(file.path for file in listing.files)
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    return SpecError(
        f"cannot fetch {model.id} as a whole: {why}", status=422,
        hint=f"{'name one of its GGUF files, or a quantisation (' + model.id + ':Q4_K_M); ' if ggufs else ''}"
        f"it has: {', '.join(names[:20]) or 'no file'}{more}",
    )  # fmt: skip
