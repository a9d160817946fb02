"""The configuration in effect, as it may be shown: secrets are masked, paths are text."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pool_managerd.config import Config

MASK = "***"
_SECRET_FLAG = re.compile(r"(?:^|-)(?:api-?key|key|token|secret|password|passwd|passphrase|credentials?|auth|authorization)$")
_USERINFO = re.compile(r"(?<=://)[^/@\s]{1,256}@")


def effective(config: Config) -> dict[str, Any]:
    """Every key with the value that holds. Values of ``env`` and of flags such as ``--api-key`` are masked."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude={"base_dir"})
    for pool in found["pools"]:
        provisioning = pool["provisioning"]
        provisioning["env"] = dict.fromkeys(provisioning.get("env") or {}, MASK)
        provisioning["flags"] = _masked_flags(provisioning.get("flags") or [])
    return _without_userinfo(found)  # type: ignore[no-any-return]


def yaml_text(found: dict[str, Any]) -> str:
    """As YAML that can be read back."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # in the order of the reference
    writer.width = 4096
    writer.dump(found, text)
    return text.getvalue()


def _masked_flags(flags: list[str]) -> list[str]:
    shown: list[str] = []
    secret = False
    for word in flags:
        name, joined, _ = word.partition("=")
        is_secret = name.startswith("--") and _SECRET_FLAG.search(name.lower()) is not None
        shown.append(f"{name}={MASK}" if is_secret and joined else MASK if secret and not name.startswith("--") else word)
        secret = is_secret and not joined
    return shown


def _without_userinfo(value: Any) -> Any:
    if isinstance(value, str):
        return _USERINFO.sub(MASK + "@", value)
    if isinstance(value, list):
        return [_without_userinfo(item) for item in value]
    return {key: _without_userinfo(item) for key, item in value.items()} if isinstance(value, dict) else value
