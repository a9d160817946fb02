"""What this machine has, as far as the PATH tells."""

from __future__ import annotations

import shutil
from collections.abc import Mapping


def cuda_available(env: Mapping[str, str]) -> bool:
    """True when ``nvcc`` or ``nvidia-smi`` is on the PATH of ``env`` (B-PREFLIGHT-001..004)."""
    return any(shutil.which(tool, path=env.get("PATH", "")) for tool in ("nvcc", "nvidia-smi"))
