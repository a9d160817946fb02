"""How the hub is reached: by the variables of the environment, and the login, that its own programs go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yarl import URL

from pool_managerd.errors import SpecError

HUB = "https://huggingface.co"
_MAX_TOKEN_BYTES = 4096
_YES = frozenset({"1", "on", "yes", "true"})


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Where the hub is, and what opens its private and gated repositories. ``offline``: it is never asked."""

    endpoint: URL = field(default_factory=lambda: URL(HUB))
    token: str | None = field(default=None, repr=False)
    offline: bool = False

    @classmethod
    def of(cls, env: Mapping[str, str]) -> HubAccess:
        """By HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN; without a token there, that of ``hf auth login``. Raises SpecError."""
        text = (env.get("HF_ENDPOINT") or HUB).rstrip("/")
        try:
            endpoint = URL(text)
        except ValueError:
            endpoint = URL()
        if endpoint.scheme not in ("http", "https") or not endpoint.host or endpoint.user or endpoint.query_string:
            raise SpecError(f"cannot use HF_ENDPOINT: it is no address such as {HUB}", code="CONFIG_ERROR")
        return cls(endpoint, env.get("HF_TOKEN", "").strip() or _login(env), _is_yes(env, "HF_HUB_OFFLINE"))


def _login(env: Mapping[str, str]) -> str | None:
    """What the login of this process's user has left."""
    if _is_yes(env, "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    home = env.get("HF_HOME") or (f"{env['XDG_CACHE_HOME']}/huggingface" if env.get("XDG_CACHE_HOME") else None)
    home = home or (f"{env['HOME']}/.cache/huggingface" if env.get("HOME") else None)
    path = env.get("HF_TOKEN_PATH") or (f"{home}/token" if home else None)
    if path is None:
        return None
    try:
        if not Path(path).is_file():  # of another user's home, where that is HOME, nobody may even ask
            return None
        with Path(path).open("rb") as file:
            token = file.read(_MAX_TOKEN_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return token if token.isprintable() and " " not in token and token else None


def _is_yes(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() in _YES
