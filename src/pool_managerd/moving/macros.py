"""Macros of llama-swap: variables of the environment first, in the text; then named ones, MODEL_ID and PORT, in the values.

Later macros may hold earlier ones, a model's own win over those of the file, and a value that is one macro alone keeps its type.
A variable whose name says that it is a secret is not read: a mark stands for it, and what holds the mark is not written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pool_managerd.config.parse import KeyPath, Tree
from pool_managerd.errors import SpecError
from pool_managerd.moving.source import Source, go_text, parsed, wrong

MAX_EXPANDED_CHARS = 1 << 20
"""Of all values together: macros that hold each other twice grow without end."""
MAX_MACROS = 500
RESERVED = ("PID", "PORT", "MODEL_ID")
TOP_KEYS = frozenset({
    "healthCheckTimeout", "logRequests", "logLevel", "logTimeFormat", "logToStdout", "metricsMaxInMemory", "captureBuffer",
    "store", "ui", "performance", "globalTTL", "unloadTimeout", "models", "profiles", "selectors", "routing", "groups", "matrix",
    "macros", "startPort", "hooks", "sendLoadingState", "includeAliasesInList", "apiKeys", "peers", "upstream",
})  # fmt: skip
"""Those that llama-swap knows."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,63}")
_USE = re.compile(r"\$\{([a-zA-Z0-9_-]+)\}")
_ENV_USE = re.compile(r"\$\{env\.([a-zA-Z_][a-zA-Z0-9_]*)\}")
_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|CREDENTIAL)S?(_?\d+)?(_|$)", re.IGNORECASE)
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}([a-zA-Z0-9_]*){_CLOSE}")
_DEFAULT_PROXY = "http://localhost:${PORT}"

Macro = tuple[str, Any]


def holds_secret(value: object) -> bool:
    """Whether a secret of the environment would stand in ``value``."""
    return any(_OPEN in text for text in strings(value))


def without_marks(text: str) -> str:
    """``text`` as it was written, for comments."""
    return _MARK.sub(r"${env.\1}", text)


def strings(value: object, *, keys: bool = True) -> Iterator[str]:
    """Every text in ``value``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if keys:
                yield key
            yield from strings(part, keys=keys)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part, keys=keys)


def read(text: str, name: str, env: Mapping[str, str]) -> tuple[Source, set[str]]:
    """The file with every macro expanded, and the names of the macros that are used.

    Raises SpecError (``CONFIG_ERROR``) for what llama-swap could not load either.
    """
    try:
        tree = parsed(text, name)
        original, used_in = copy.deepcopy(tree.values), "\n".join(strings(tree.values))
    except SpecError:
        if "${env." not in text:
            raise
        tree, original, used_in = Tree(), {}, text  # it may be YAML when the variables are in it
    if variables := dict.fromkeys(_ENV_USE.findall(used_in)):
        tree = parsed(_with_env(text, variables, name, env), name)
    return _Expansion(Source(name, tree.values, tree.places, original)).run()


def _with_env(text: str, variables: Iterable[str], name: str, env: Mapping[str, str]) -> str:
    for variable in variables:
        use = f"${{env.{variable}}}"
        if _SECRET.search(variable):
            value = f"{_OPEN}{variable}{_CLOSE}"
        elif variable not in env:
            line = next((number for number, part in enumerate(text.splitlines(), 1) if use in part), 1)
            raise wrong(
                f"{name}:{line}", f"cannot expand {use}: the environment has no {variable}",
                f"run it where llama-swap runs, or write `{variable}=… pool-managerd import llama-swap FILE`",
            )  # fmt: skip
        else:
            value = env[variable].replace("\\", "\\\\").replace('"', '\\"')
        if any(char in value for char in "\n\r\0"):
            raise wrong(name, f"cannot expand {use}: its value has a line break or a NUL")
        if len(text) + text.count(use) * len(value) > MAX_EXPANDED_CHARS:
            raise wrong(name, f"cannot expand {use}: the file would be larger than {MAX_EXPANDED_CHARS} characters")
        text = text.replace(use, value)
    return text


class _Expansion:
    """One pass over the values of a file. ``_left`` is how much they may still grow."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._used: set[str] = set()
        self._left = MAX_EXPANDED_CHARS

    def run(self) -> tuple[Source, set[str]]:
        source = self._source
        everywhere = self._declared(("macros",))
        for key in [key for key in source.values if key not in ("macros", "models")]:
            source.values[key] = self._expanded(source.values[key], everywhere, (key,))
            if key in TOP_KEYS:
                self._no_unknown(source.values[key], (key,))
        port = source.whole(("startPort",), 5800)
        if port < 1:
            raise source.wrong(("startPort",), f"cannot use {port}: it must be at least 1")
        models = source.mapping(("models",))
        for model in sorted(models):
            if isinstance(models[model], dict):
                port += self._model(model, models[model], everywhere, port)
        return source, self._used

    def _declared(self, path: KeyPath) -> list[Macro]:
        found = list(self._source.mapping(path).items())
        if len(found) > MAX_MACROS:
            raise self._source.wrong(path, f"cannot use more than {MAX_MACROS} macros")
        for name, value in found:
            at = (*path, name)
            if not _NAME.fullmatch(name):
                raise self._source.wrong(at, "cannot use this name: it has 1 to 63 letters, digits, '_' or '-'")
            if name in RESERVED:
                raise self._source.wrong(at, "cannot use this name: llama-swap sets it itself")
            if value is None or isinstance(value, dict | list):
                raise self._source.wrong(at, "cannot use this value: it must be text, a number, true or false")
            if isinstance(value, str) and f"${{{name}}}" in value:
                raise self._source.wrong(at, "cannot expand it: it holds itself")
        return found

    def _model(self, name: str, model: dict[str, Any], everywhere: Sequence[Macro], port: int) -> int:
        """How many ports it takes."""
        path: KeyPath = ("models", name)
        macros = dict([("MODEL_ID", name), *everywhere])
        macros |= dict(self._declared((*path, "macros")))
        own = {key: value for key, value in model.items() if key != "macros"}
        for key in ("cmd", "cmdStop"):
            if isinstance(own.get(key), str):
                own[key] = without_comments(own[key])
        own["proxy"] = _DEFAULT_PROXY if own.get("proxy") is None else own["proxy"]
        own = self._expanded(own, list(macros.items()), path)
        takes = "${PORT}" in go_text(own.get("cmd"))
        if takes:
            own = self._expanded(own, [("PORT", port)], path)
        elif "proxy" not in model:
            own.pop("proxy")
        elif "${PORT}" in go_text(own["proxy"]):
            raise self._source.wrong((*path, "proxy"), "cannot expand ${PORT}: the cmd does not use it")
        for key, value in own.items():
            self._no_unknown(value, (*path, key), ("PID",) if key == "cmdStop" else ())
        if takes:
            self._source.ports[name] = port
        if takes and model.get("proxy") is None:
            own.pop("proxy")
        if "macros" in model:
            own["macros"] = model["macros"]
        model.clear()
        model.update(own)
        return int(takes)

    def _expanded(self, value: Any, macros: Sequence[Macro], path: KeyPath) -> Any:
        """``value`` with each of ``macros``, the last one first, as what comes out may hold earlier ones."""
        if isinstance(value, str):
            return self._scalar(value, macros, path)
        if isinstance(value, list):
            return [self._expanded(part, macros, path) for part in value]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, part in value.items():
            new = go_text(self._scalar(key, macros, path)) if _keys_too(path) else key
            if new in found:
                raise self._source.wrong((*path, key), f"cannot expand it: two keys are {new[:80]!r} then")
            found[new] = self._expanded(part, macros, (*path, key))
        return found

    def _scalar(self, text: str, macros: Sequence[Macro], path: KeyPath) -> Any:
        for name, value in reversed(macros):
            if "${" not in text:
                break
            use = f"${{{name}}}"
            if text == use and not isinstance(value, str):
                self._used.add(name)
                return value
            if times := text.count(use):
                self._used.add(name)
                new = go_text(value)
                self._left -= times * len(new)
                if self._left < 0:
                    reason = f"the macros grow beyond {MAX_EXPANDED_CHARS} characters"
                    raise self._source.wrong(path, f"cannot expand {use}: {reason}")
                text = text.replace(use, new)
        return text

    def _no_unknown(self, value: Any, path: KeyPath, known: Sequence[str] = ()) -> None:
        by_name = value.get("setParamsByID") if path[2:] == ("filters",) and isinstance(value, dict) else None
        keys = by_name if isinstance(by_name, dict) else {}
        for text in (*keys, *strings(value, keys=False)):
            for name in _USE.findall(text):
                if name not in known:
                    raise self._source.wrong(path, f"cannot expand ${{{name}}}: there is no macro of that name")


def _keys_too(path: KeyPath) -> bool:
    """Whether macros are expanded in the keys of the mapping at ``path``, too."""
    return len(path) == 4 and path[0] == "models" and path[2:] == ("filters", "setParamsByID")


def without_comments(command: str) -> str:
    """A command without its lines that begin with ``#``."""
    return "\n".join(line for line in command.split("\n") if not line.strip().startswith("#"))
