"""The environment an engine gets: what it needs to run, and nothing of what the daemon knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from pool_managerd.runtime.procfs import NONCE_VARIABLE

_INHERITED = frozenset({"PATH", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH"})
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")
# NVIDIA_API_KEY is one: a prefix alone would let it through.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# Engines put Unix sockets there: with a name of their own (37 bytes in vLLM) a path may have 107 bytes.
_MAX_TMPDIR_BYTES = 64


def engine_environment(
    inherited: Mapping[str, str], own: Mapping[str, str], *, home: str, cache: str, nonce: str
) -> dict[str, str]:
    """What of ``inherited`` is harmless, then ``HOME`` and what lies in it, then the engine's ``own`` variables, then marks.

    ``SPT_NOENV`` keeps setproctitle from writing a title over the environment, and so over the nonce.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and not _SECRET.search(name)
    }
    places = {"HOME": home, "XDG_CACHE_HOME": cache}
    temporary = os.path.join(home, "tmp")
    if len(os.fsencode(temporary)) <= _MAX_TMPDIR_BYTES:
        places["TMPDIR"] = temporary
    return {"PATH": _DEFAULT_PATH, **kept, **places, "SPT_NOENV": "1", **own, NONCE_VARIABLE: nonce}
