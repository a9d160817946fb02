"""The configuration in effect, as it may be shown: secrets are masked, paths are text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pool_managerd.core.redaction import masked_argv, masked_env, masked_text

if TYPE_CHECKING:
    from pool_managerd.config import Config


def effective(config: Config) -> dict[str, Any]:
    """Every key with the value that holds. What is secret in environments, flags and URLs is masked."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude={"base_dir"})
    for pool in found["pools"]:
        provisioning = pool["provisioning"]
        provisioning["env"] = masked_env(provisioning.get("env") or {})
        provisioning["flags"] = masked_argv(provisioning.get("flags") or [])
    return _masked(found)  # type: ignore[no-any-return]


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


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return {key: _masked(item) for key, item in value.items()} if isinstance(value, dict) else value
