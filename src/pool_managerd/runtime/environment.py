"""The environment an engine gets: what it needs to run, and nothing of what the daemon knows."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pool_managerd.runtime.procfs import NONCE_VARIABLE

_INHERITED = frozenset({"PATH", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH"})
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")
# NVIDIA_API_KEY is one: a prefix alone would let it through.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def engine_environment(inherited: Mapping[str, str], own: Mapping[str, str], *, home: str, nonce: str) -> dict[str, str]:
    """What of ``inherited`` is harmless, then ``HOME``, then the engine's ``own`` variables, then the nonce."""
    kept = {
        name: value
        for name, value in inherited.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and not _SECRET.search(name)
    }
    return {"PATH": _DEFAULT_PATH, **kept, "HOME": home, **own, NONCE_VARIABLE: nonce}
