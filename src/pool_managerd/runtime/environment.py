"""The environment an engine gets: what it needs to run, and nothing of what the daemon knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pool_managerd.runtime.procfs import NONCE_VARIABLE

_INHERITED = frozenset({"PATH", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH"})
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_")
# NVIDIA_API_KEY is one: a prefix alone would let it through.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# Engines put Unix sockets there: with a name of their own (37 bytes in vLLM) a path may have 107 bytes.
_MAX_TMPDIR_BYTES = 64


@dataclass(frozen=True, slots=True)
class Places:
    """Where an engine may write: what it works in, what ends with the launch, what a later launch may use again.

    ``user`` is whose they are: its name, or its number when it has none.
    """

    home: str
    temporary: str
    cache: str
    user: str


def engine_environment(inherited: Mapping[str, str], own: Mapping[str, str], places: Places, nonce: str) -> dict[str, str]:
    """What of ``inherited`` is harmless, then where it may write, then the engine's ``own`` variables, then the nonce.

    ``SPT_NOENV`` keeps setproctitle from writing a title over the environment, and so over the nonce. Programs that want
    the user's name (Python's getpass) find it without a user database. What PyTorch compiles would be temporary by default.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and not _SECRET.search(name)
    }
    where = {
        "HOME": places.home, "USER": places.user, "LOGNAME": places.user,
        "XDG_CACHE_HOME": places.cache, "TORCHINDUCTOR_CACHE_DIR": os.path.join(places.cache, "torchinductor"),
    }  # fmt: skip
    if len(os.fsencode(places.temporary)) <= _MAX_TMPDIR_BYTES:
        where["TMPDIR"] = places.temporary
    return {"PATH": _DEFAULT_PATH, **kept, **where, "SPT_NOENV": "1", **own, NONCE_VARIABLE: nonce}
