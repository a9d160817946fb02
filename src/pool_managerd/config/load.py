"""One configuration out of a file, the environment and flags: flags win over the environment, it over the file.

Everything wrong is reported at once, each problem with its place and, for a misspelt key, the key that was meant
(OC-CONFIG-6001). Relative paths: ``daemon.runtime_dir`` and ``daemon.state_dir`` are relative to the current
directory, every other path to the directory of the configuration file, which becomes ``Config.base_dir``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pool_managerd.config import Config, DaemonConfig, json_schema, path_from
from pool_managerd.config.key_shapes import Shape
from pool_managerd.config.parse import (
    EXTENSION,
    MAX_PROBLEMS,
    KeyPath,
    Problem,
    Tree,
    key_text,
    parse_file,
    parse_scalar,
    parse_text,
    place_of,
)
from pool_managerd.config.problems import explain, merged, unknown_key
from pool_managerd.errors import SpecError

ENV_PREFIX = "POOL_MANAGERD__"
LEGACY_ENV = {"POOL_MANAGERD_ADDR": ("daemon", "bind"), "POOL_MANAGERD_RUNTIME_DIR": ("daemon", "runtime_dir")}

MAX_LINE_CHARS = 600
_CWD_PATHS: tuple[tuple[str, str], ...] = (("daemon", "runtime_dir"), ("daemon", "state_dir"))


def load_config(path: Path | None, *, env: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of ``path`` (YAML, or TOML by its extension; None: all defaults), with overrides applied.

    ``env`` may set any key as ``POOL_MANAGERD__SECTION__KEY`` (list items by number). ``overrides`` are flags, by
    dotted key (``{"daemon.bind": "127.0.0.1:0"}``); a None value is a flag that was not given.
    Raises SpecError (``CONFIG_ERROR``) whose message has one line per problem.
    """
    return _loaded(parse_file(path) if path is not None else Tree(), path, env, overrides)


def load_text(text: str, path: Path, *, env: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Config:
    """As ``load_config``, if ``text`` were what is in ``path``."""
    return _loaded(parse_text(text, path), path, env, overrides)


def _loaded(tree: Tree, path: Path | None, env: Mapping[str, str], overrides: Mapping[str, Any] | None) -> Config:
    here = _current_directory()
    if not tree.problems:
        _apply_env(tree, env)
        _apply_flags(tree, overrides or {})
    if tree.problems:
        raise _error(tree.problems)
    base_dir = path.absolute().parent if path is not None else here
    daemon = tree.values.setdefault("daemon", {})
    for _, key in _CWD_PATHS if isinstance(daemon, dict) else ():
        daemon.setdefault(key, str(getattr(DaemonConfig(), key)))
    tree.values = _absolute(tree.values, (), base_dir, here)
    return _validate(tree, base_dir)


def load_values(values: dict[str, Any], base_dir: Path) -> Config:
    """The configuration that ``values`` say, as a file in ``base_dir`` would. Raises SpecError (``CONFIG_ERROR``)."""
    return _validate(Tree(_absolute(values, (), base_dir, base_dir)), base_dir)


def _current_directory() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise SpecError(
            f"cannot tell what paths are relative to: the current directory is gone ({error.strerror})",
            code="CONFIG_ERROR", hint="cd to a directory that is there",
        ) from error  # fmt: skip


def _validate(tree: Tree, base_dir: Path) -> Config:
    problems = _own_checks(tree)
    try:
        # JSON mode is strict about types ("4" is no number, true is no 1) and still takes lists and paths as written.
        text = json.dumps({**tree.values, "base_dir": str(base_dir)}, default=str)
        config = Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        missed = max(0, len(errors) - MAX_PROBLEMS)
        found = (explain(item, tree) for item in islice(errors, MAX_PROBLEMS))
        problems += merged(problem for problem in found if problem is not None)
        raise _error(problems, missed) from None
    if problems:
        raise _error(problems)
    return config


def _own_checks(tree: Tree) -> list[Problem]:
    """What the schema cannot place: an inner key given from outside, and the second pool of one name."""
    problems: list[Problem] = []
    if "base_dir" in tree.values:
        problems.append(unknown_key(("base_dir",), tree))
    first: dict[str, int] = {}
    pools = tree.values.get("pools")
    for index, pool in enumerate(pools if isinstance(pools, list) else []):
        name = pool.get("id") if isinstance(pool, dict) else None
        if isinstance(name, str) and first.setdefault(name, index) != index:
            where = tree.places.get(("pools", first[name], "id"), f"pools[{first[name]}]")
            text = f"cannot use {name!r} again: duplicate pool id, first used at {where}; every pool needs its own"
            problems.append(Problem(place_of(tree, ("pools", index, "id")), f"pools[{index}].id", text))
    return problems


CHECKS_A_FILE = "; `pool-managerd config check FILE` checks a file"
"""What ends the hint: whoever has just checked a file need not be told."""


def _error(problems: list[Problem], missed: int = 0) -> SpecError:
    missed += max(0, len(problems) - MAX_PROBLEMS)
    problems = sorted(problems, key=_order)[:MAX_PROBLEMS]
    lines = list(dict.fromkeys(_cut(str(problem)) for problem in problems))
    if missed:
        lines.append(f"… and {missed} more")
    return SpecError(
        "\n".join(lines),
        code="CONFIG_ERROR",
        hint=f"`pool-managerd config schema` prints every key{CHECKS_A_FILE}",
        details={"problems": [{"place": p.place, "key": _cut(p.key), "text": _cut(p.text)} for p in problems]},
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE_CHARS else text[: MAX_LINE_CHARS - 1] + "…"


def _order(problem: Problem) -> tuple[str, list[int]]:
    """In the order of the file: ``FILE:9:5`` before ``FILE:10:1``."""
    name, *numbers = problem.place.split(":")
    return name, [int(number) for number in numbers if number.isdigit()]


def _apply_env(tree: Tree, env: Mapping[str, str]) -> None:
    given: dict[KeyPath, tuple[str, Any]] = {}
    for name in sorted(env):
        if name in LEGACY_ENV:
            path: KeyPath = LEGACY_ENV[name]
        elif name.startswith(ENV_PREFIX):
            path = _env_path(name.removeprefix(ENV_PREFIX))
        else:
            continue
        value = _typed(path, env[name])
        if path in given and given[path][1] != value:
            text = f"cannot set it to two values: {given[path][0]} says otherwise; unset one of them"
            tree.problems.append(Problem(f"${name}", key_text(path), text))
        given[path] = (name, value)
    for path, (name, value) in given.items():
        _set(tree, path, value, f"${name}")


def _env_path(text: str) -> KeyPath:
    """Key path of ``POOLS__0__SLOTS``: lower case, numbers are list positions; keys of free maps stay as written."""
    parts: list[str | int] = []
    for part in text.split("__"):
        if Shape.at(tuple(parts)).is_free_map:
            parts.append(part)
        else:
            parts.append(int(part) if part.isascii() and part.isdigit() and len(part) < 5 else part.lower())
    return tuple(parts)


def _typed(path: KeyPath, text: str) -> Any:
    """The value meant by ``text``: as it stands where the schema wants text, else read as a YAML scalar or JSON."""
    shape = Shape.at(path)
    if shape.takes("string"):
        return None if shape.takes("null") and text in ("", "null", "~") else text
    return parse_scalar(text)


def _apply_flags(tree: Tree, overrides: Mapping[str, Any]) -> None:
    for dotted, value in overrides.items():
        if value is not None:
            path = tuple(dotted.split("."))
            _set(tree, path, str(value) if isinstance(value, Path) else value, "--" + str(path[-1]).replace("_", "-"))


def _set(tree: Tree, path: KeyPath, value: Any, place: str) -> None:
    """Write one override into the tree, making the sections on its way; its place becomes the override's name."""
    here: Any = tree.values
    for index, part in enumerate(path):
        last = index == len(path) - 1
        if isinstance(here, dict) and isinstance(part, str) and part:
            nested: Any = [] if not last and isinstance(path[index + 1], int) else {}
            here[part] = value if last else (nested if here.get(part) is None else here[part])
        elif isinstance(here, list) and isinstance(part, int) and part <= len(here):
            if part == len(here):
                here.append({})
            here[part] = value if last else here[part]
        else:
            tree.problems.append(Problem(place, key_text(path), f"cannot set it: there is no {key_text(path[: index + 1])}"))
            return
        tree.places.setdefault(path[: index + 1], place)
        here = here[part]
    for known in [known for known in tree.places if known[: len(path)] == path]:
        tree.places[known] = place


def _absolute(value: Any, path: KeyPath, base_dir: Path, here: Path) -> Any:
    """``value`` of the key ``path``, every path in it absolute."""
    if isinstance(value, dict):
        return {key: _absolute(part, (*path, key), base_dir, here) for key, part in value.items()}
    if isinstance(value, list):
        return [_absolute(part, (*path, index), base_dir, here) for index, part in enumerate(value)]
    if isinstance(value, str) and value and Shape.at(path).takes("path"):
        return str(path_from(here if path in _CWD_PATHS else base_dir, value))
    return value


def config_schema_text() -> str:
    """The JSON Schema of the configuration file as text: the same bytes every time (OC-CONFIG-6010)."""
    schema = json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "pool-managerd configuration"
    schema["patternProperties"] = {f"^{EXTENSION}": {"description": "Not read: a place for YAML anchors."}}
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
