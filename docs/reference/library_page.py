"""The library's reference page, made from what its public names say of themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pool_managerd
from pool_managerd.core.event import EVENT_TYPES
from pool_managerd.errors import CODES, PoolError

_HEAD = """\
# Library

Made from the code by `python docs/reference/regenerate.py`; do not edit. Two complete programs that the tests run:
`examples/embed.py` and `examples/watch.py`.

```python
from pathlib import Path

from pool_managerd import PoolError, PoolManager, load_config

async with PoolManager(load_config(Path("pool-managerd.yaml"), env={})) as node:
    try:
        async with node.acquire("chat", holder="me") as lease:  # joins a start that is under way, and waits for a slot
            ...  # talk to lease.url
    except PoolError as error:
        print(error.code, error.retriable, error.message, error.hint)
```

Everything is imported from `pool_managerd`. A node runs in the caller's event loop, installs no signal handlers and
configures no logging. All methods may be called at once by any number of tasks of that loop, and by no other thread.
A caller that is cancelled leaves no half of a change behind. Changes are durable before they return, and return an
`Operation`; `await operation.wait()` waits for its end.
"""


def library() -> str:
    """The whole page: the same bytes every time."""
    others = [name for name in pool_managerd.__all__ if name not in {*_FIRST, "__version__"}]
    kinds = [name for name in others if _is_error(getattr(pool_managerd, name))]
    parts = [_HEAD, *(text for name in _FIRST for text in _described(name)), "## Events\n", _table("Type", EVENT_TYPES)]
    parts += ["## Errors\n", *(f"- `{name}`: {_words(getattr(pool_managerd, name))}" for name in kinds)]
    parts += ["", _table("Code", CODES), "## Everything else\n"]
    parts += [text for name in others if name not in kinds for text in _described(name, "###")]
    return "\n".join(parts).rstrip() + "\n"


_FIRST = ("PoolManager", "Operation", "Event", "Subscription")


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, PoolError)


def _described(name: str, level: str = "##") -> Iterator[str]:
    thing = getattr(pool_managerd, name)
    yield f"{level} {name}\n"
    if not inspect.isclass(thing):
        yield from (_code(f"{name}{_signature(thing)}"), _words(thing), "")
        return
    shown = f"{name}{_signature(thing.__init__)}" if not dataclasses.is_dataclass(thing) else _fields(thing)
    yield from (_code(shown), _words(thing), "")
    for attribute, member in vars(thing).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if attribute.startswith("_") or not inspect.isfunction(function):
            continue
        call = "await " if inspect.iscoroutinefunction(function) else ""
        yield from (f"{level}# {name}.{attribute}\n", _code(f"{call}{attribute}{_signature(function)}"), _words(function), "")


def _fields(thing: Any) -> str:
    rows = [f"    {f.name}: {f.type}" for f in dataclasses.fields(thing) if not f.name.startswith("_")]
    return f"{thing.__name__}(\n" + ",\n".join(rows) + "\n)"


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in {"self", "cls"}]
    text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "…", str(signature.replace(parameters=parameters)).replace("'", ""))
    return re.sub(r"\bpool_managerd\.[a-z_.]+\.", "", text).removesuffix(" -> None")


def _words(thing: Any) -> str:
    """Its docstring, with code marked as Markdown does."""
    return inspect.cleandoc(thing.__doc__ or "").replace("``", "`")


def _code(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _table(head: str, rows: Any) -> str:
    lines = [f"| {head} | Meaning |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in rows.items())]
    return "\n".join(lines) + "\n"
