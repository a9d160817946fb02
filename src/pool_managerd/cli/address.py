"""Where the daemon of a configuration file answers, read without the schema: a command that asks must start fast.

A running daemon can be asked although its file has mistakes elsewhere. What is not plain here is left to the loader, whose
errors name the place: anything in the environment that changes a key, a ``daemon`` section without a plain ``bind``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BIND = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """Of a daemon, with the files that may hold tokens for it."""

    host: str
    port: int
    token_file: Path | None
    state_dir: Path

    @property
    def url(self) -> str:
        """What a client can call, also where the daemon listens on every address."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def of_config(path: Path | None, env: Mapping[str, str]) -> Address:
    """The address in the file at ``path``, or the default one. Raises SpecError for a file that cannot be used."""
    overridden = env.get("POOL_MANAGERD_ADDR") or any(name.startswith("POOL_MANAGERD__") for name in env)
    if path is not None and not overridden and (found := _plain(path)) is not None:
        return found
    return _loaded(path, env)


def _plain(path: Path) -> Address | None:
    from pool_managerd.config.parse import parse_file

    tree = parse_file(path)
    daemon, auth = _section(tree.values, "daemon"), _section(tree.values, "auth")
    if tree.problems or daemon is None or auth is None:
        return None
    bind = daemon.get("bind", "127.0.0.1:9200" if not daemon else None)
    written = _BIND.fullmatch(bind) if isinstance(bind, str) else None
    token, state = auth.get("token_file"), daemon.get("state_dir", ".state")
    if written is None or int(written["port"]) > 65535 or not isinstance(state, str) or not isinstance(token, str | None):
        return None
    token_file = path.absolute().parent / token if token else None
    return Address(written["v6"] or written["host"], int(written["port"]), token_file, Path(state))


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Empty where it is not written; None where it is no mapping."""
    found = values.get(name, {})
    return found if isinstance(found, dict) else None


def _loaded(path: Path | None, env: Mapping[str, str]) -> Address:
    from pool_managerd.config import split_address
    from pool_managerd.config.load import load_config

    config = load_config(path, env=env)
    host, port = split_address(config.daemon.bind)
    return Address(host, port, config.auth.token_file, config.daemon.state_dir)
