"""The configuration reference as Markdown, made from the schema: every key, its type, default and meaning."""

from __future__ import annotations

import json
from typing import Any

from pool_managerd.config import json_schema
from pool_managerd.config.key_shapes import alternatives

_HEAD = """\
# Configuration reference

Made from the schema by `python -m pool_managerd.config.reference`; do not edit. The schema itself is
[config.schema.json](config.schema.json), which `pool-managerd config schema` prints.

The file is YAML 1.2, or TOML when its name ends in `.toml`. Unknown keys are errors. Flags win over the environment, the
environment over the file. Any key can be set from the environment: `POOL_MANAGERD__SUPERVISION__BACKOFF__INITIAL_MS=5`,
list items by number (`POOL_MANAGERD__POOLS__0__SLOTS=4`); `POOL_MANAGERD_ADDR` is `daemon.bind` and
`POOL_MANAGERD_RUNTIME_DIR` is `daemon.runtime_dir`. `daemon.runtime_dir` and `daemon.state_dir` are relative to the current
directory, all other paths, `file:` models included, to the directory of the configuration file.

In YAML, keys that several pools share can be written once and taken over with `<<`, as in compose files; a key of the pool's
own wins. Top-level keys that begin with `x-` are not read, so that anchors have a place:

```yaml
x-small: &small
  engine: llamacpp
  ctx: 4096
pools:
  - {<<: *small, id: a, model: "file:a.gguf"}
  - {<<: *small, id: b, model: "file:b.gguf", ctx: 8192}
```

An editor with the YAML language server completes and checks keys when the file begins with:

```yaml
# yaml-language-server: $schema=./docs/reference/config.schema.json
```
"""


def reference_text() -> str:
    """The whole page: the same bytes every time."""
    parts = [_HEAD]
    todo: list[tuple[str, dict[str, Any]]] = [("", json_schema())]
    seen: set[str] = set()
    while todo:
        prefix, node = todo.pop(0)
        parts.append(_section(prefix, node))
        for name, value in node["properties"].items():
            inner, suffix = _section_of(value)
            path = f"{prefix}.{name}{suffix}".lstrip(".")
            if inner is not None and path not in seen:
                seen.add(path)
                todo.append((path, inner))
    return "\n".join(parts)


def _section(prefix: str, node: dict[str, Any]) -> str:
    title = f"## `{prefix}`" if prefix else "## Top level"
    rows = ["| Key | Type | Default | Meaning | Example |", "|---|---|---|---|---|"]
    required = node.get("required", ())
    for name, value in node["properties"].items():
        inner, _ = _section_of(value)
        kind = "section" if inner is not None and value.get("type") != "array" else _kind(value)
        default = "required" if name in required else "" if kind == "section" else f"`{_json(value.get('default'))}`"
        meaning = value.get("description") or (inner or {}).get("description", "")
        given = value.get("examples") or [value.get("default")]
        example = "" if kind == "section" else f"`{name}: {_flow(given[0])}`"
        rows.append(f"| `{name}` | {kind} | {default} | {' '.join(meaning.split())} | {example} |")
    about = " ".join(node.get("description", "").split())
    return "\n".join([title, "", *([about, ""] if prefix else []), *rows, ""])


def _flow(value: object) -> str:
    """As it may stand in the file, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _json(value)


def _section_of(value: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The section that a key leads to, if any, and ``[]`` when it is a list of them."""
    for node in alternatives(value):
        if "properties" in node:
            return node, ""
        if "$ref" in node.get("items", {}):
            return _section_of(node["items"])[0], "[]"
    return None, ""


def _kind(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(part) for part in value["anyOf"]))
    if "enum" in value:
        return ", ".join(f"`{item}`" for item in value["enum"])
    if value.get("type") == "array":
        return f"list of {_kind(value['items'])}" if "$ref" not in value["items"] else "list of sections"
    if "additionalProperties" in value:
        return f"map of {_kind(value['additionalProperties'])}"
    bounds = [f"{sign} {value[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in value]
    names = {"string": "path" if value.get("format") == "path" else "text", "integer": "whole number", "boolean": "true or false"}
    return " ".join([names.get(value.get("type", ""), value.get("type", "any")), *bounds])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference_text())
