"""A validation error in the words of the file: its place, its key, what was found and what may stand there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic_core import ErrorDetails

from pool_managerd.config.key_shapes import Shape
from pool_managerd.config.parse import KeyPath, Problem, Tree, key_text, place_of

_RULES: dict[str, Callable[[dict[str, Any]], str]] = {
    "greater_than_equal": lambda ctx: f"must be ≥ {ctx['ge']}",
    "greater_than": lambda ctx: f"must be > {ctx['gt']}",
    "less_than_equal": lambda ctx: f"must be ≤ {ctx['le']}",
    "less_than": lambda ctx: f"must be < {ctx['lt']}",
    "literal_error": lambda ctx: f"must be {ctx['expected']}",
    "string_pattern_mismatch": lambda ctx: f"must match {ctx['pattern']}",
    "int_type": lambda ctx: "must be a whole number",
    "int_from_float": lambda ctx: "must be a whole number",
    "int_parsing_size": lambda ctx: "the number is too large",
    "float_type": lambda ctx: "must be a number",
    "bool_type": lambda ctx: "must be true or false",
    "string_type": lambda ctx: "must be text; put it in quotes if it looks like a number",
    "path_type": lambda ctx: "must be a path",
    "dict_type": lambda ctx: "must be a mapping",
    "tuple_type": lambda ctx: "must be a list",
    "model_type": lambda ctx: "must be a section of keys",
    "model_attributes_type": lambda ctx: "must be a section of keys",
}


_IN_A_POOL = {
    **dict.fromkeys(("port", "ports"), "provisioning.ports, as `provisioning: {ports: [8080]}`"),
    **dict.fromkeys(("args", "flags", "extra_args", "options", "cmd", "command"), "provisioning.flags"),
    **dict.fromkeys(("env", "environment"), "provisioning.env"),
    **dict.fromkeys(("mode", "url", "binary", "container", "package"), "provisioning.{key}"),
    **dict.fromkeys(("binary_path", "executable"), "provisioning.binary.path"), "image": "provisioning.container.image",
    **dict.fromkeys(("checksum", "sha256", "digest"), "provisioning.model.checksum"),
    **dict.fromkeys(("gpu", "gpus", "gpu_ids", "cuda_visible_devices", "device"), "devices"),
    **dict.fromkeys(("ctx_size", "n_ctx", "num_ctx", "context_length", "max_model_len", "max_seq_len"), "ctx"),
    **dict.fromkeys(("parallel", "n_parallel", "num_parallel", "max_num_seqs", "concurrency"), "slots"),
    **dict.fromkeys(("model_path", "path", "file"), "model, as `model: \"file:…\"`"), "name": "id",
    **dict.fromkeys(("alias", "aliases", "served_model_name"), "served_name"), "vram": "vram_bytes", "gpu_memory": "vram_bytes",
    **dict.fromkeys(("gpu_memory_utilization",), "vram_bytes, as `vram_bytes: 20GiB`"), "quantization": "quant",
    **dict.fromkeys(("autostart", "enabled", "load_on_startup"), "preload"), "timeout": "startup_timeout_ms",
}  # fmt: skip
"""What people who come from other tools write in a pool, and where it stands here."""
_AT_TOP = {
    **dict.fromkeys(("engines", "servers"), "pools"), **dict.fromkeys(("token", "api_key"), "auth.token_file"),
    **dict.fromkeys(("port", "host", "listen", "bind", "address"), "daemon.bind, as `daemon: {bind: \"127.0.0.1:9200\"}`"),
    **dict.fromkeys(("log", "logging", "log_level"), "telemetry"), "gpus": "gpu.devices", "devices": "gpu.devices",
}  # fmt: skip


def explain(item: ErrorDetails, tree: Tree) -> Problem | None:
    """The problem behind one validation error, or None when the loader reports it itself with a better place."""
    path: KeyPath = _without_choices(item["loc"])
    kind = item["type"]
    if not path:
        return None if "duplicate pool id" in item["msg"] else Problem(place_of(tree, path), "", _rule(item))
    if kind == "extra_forbidden":
        return unknown_key(path, tree, item["input"])
    if kind == "missing":
        return Problem(place_of(tree, path[:-1]), key_text(path), f"cannot leave it out: add `{path[-1]}: …`")
    return Problem(place_of(tree, path), key_text(path), f"cannot use {_shown(path, item['input'])}: {_rule(item)}")


def merged(problems: Iterable[Problem]) -> list[Problem]:
    """Several rules for one value, of which one would do, as one problem."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        what, _, rule = problem.text.partition(": ")
        found.setdefault((problem.place, problem.key, what), []).append(rule)
    return [
        Problem(place, key, f"{what}: {' or '.join(dict.fromkeys(rules))}" if any(rules) else what)
        for (place, key, what), rules in found.items()
    ]


def _rule(item: ErrorDetails) -> str:
    kind, ctx = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(ctx.get("error", item["msg"]))
    return _RULES[kind](ctx) if kind in _RULES else item["msg"]


def _without_choices(path: KeyPath) -> KeyPath:
    """Without the names that a value of several possible types adds, such as ``literal['auto']``."""
    return tuple(part for part in path if not (isinstance(part, str) and "[" in part))


def unknown_key(path: KeyPath, tree: Tree, value: object = None) -> Problem:
    """An unknown key, with the one that was probably meant."""
    known, key = Shape.at(path[:-1]).keys, str(path[-1])
    in_pool = len(path) == 3 and path[0] == "pools"
    meant = (_IN_A_POOL if in_pool else _AT_TOP if len(path) == 1 else {}).get(key.lower().replace("-", "_"))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.65)
    if meant is not None:
        hint = "it belongs into " + meant.replace("{key}", key) if "." in meant else f"write {meant}"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    elif in_pool and isinstance(value, str | int | float):
        flag = f'"--{key.replace("_", "-")}"' if value is True else f'"--{key.replace("_", "-")}", "{value}"'
        own = f"an option of the engine's own is `provisioning: {{flags: [{flag[:80]}]}}`"
        hint = f"{own}; known keys: {', '.join(sorted(known))}"
    else:
        hint = f"known keys: {', '.join(sorted(known))}"
    return Problem(place_of(tree, path), key_text(path[:-1]), f"unknown key {key!r} ({hint})")


def _shown(path: KeyPath, value: object) -> str:
    """The value as an error may show it. Environments of engines may hold secrets, so theirs are not shown."""
    if "env" in path:
        return "this value"
    if isinstance(value, dict):
        return "this"
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
        return f"[{text}]" if len(text) <= 60 and not any(isinstance(part, dict | list) for part in value) else "this list"
    text = {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
