"""What is secret, by one rule, and the one place where secrets are taken out of what is told (DESIGN §8 no. 12).

By name: the value of every environment variable that is not known to be harmless, of flags such as ``--api-key``, of keys
such as ``token``, and in URLs the userinfo and parameters such as ``?token=``. By value: all of these values of the pools
that are known, wherever they stand in a text. Not found are values of fewer than six characters, and those that the engine
prints in another form: broken over lines, URL-encoded, in base64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pool_managerd.errors import PoolError

MASK = "***"
MIN_SECRET_CHARS = 6
_SECRET_KEY = re.compile(r"secret|passw|passphrase|authorization|api[_-]?key|credential|token", re.IGNORECASE)
# Names that only look secret: where a secret is kept, and its fingerprint. Numbers such as `tokens_per_s` pass anyway.
_HARMLESS_KEY = re.compile(r"(_file|_path|fp6|_ms|_per_s|_total)$", re.IGNORECASE)
# What names and states things: whoever reads it must be able to find the thing again.
_IDENTITIES = frozenset({
    "id", "pool_id", "replica_id", "engine", "engine_version", "model_id", "device", "device_mask", "uuid", "state", "phase",
    "type", "level", "operation_id", "correlation_id", "kind", "status", "outcome", "code", "reason", "action",
})  # fmt: skip

_HARMLESS_ENV = frozenset({
    "HOME", "PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "USER", "LOGNAME", "SHELL", "PWD", "TERM", "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE", "SPT_NOENV", "MALLOC_ARENA_MAX", "NO_COLOR",
})  # fmt: skip
_HARMLESS_ENV_PREFIXES = (
    "LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "GGML_", "LLAMA_ARG_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "VLLM_",
    "TORCH_", "PYTORCH_", "TRITON_", "ROCR_", "HIP_", "POOL_MANAGERD_",
)  # fmt: skip
_SECRET_ENV = re.compile(r"KEY|TOKEN|SECRET|PASS|CRED|AUTH|SIGNATURE", re.IGNORECASE)
# The last word of a flag's name: `--hf-token` and `--api-key` are secret; `--api-key-file` and `--max-tokens` are not.
_SECRET_FLAG = re.compile(r"(?:^|-)(?:api-?key|key|token|secret|password|passwd|passphrase|credentials?|auth|authorization)$")
_FILE_FLAG = re.compile(r"(?:^|-)(?:ssl|tls)-key$|-key-type$")
_SHORT_SECRET_FLAGS = frozenset({"-hft"})
_ORDINARY = frozenset({"default", "disabled", "enabled", "localhost", "127.0.0.1", "0.0.0.0", "warning", "verbose"})  # noqa: S104
_MAX_DEPTH = 8

# Every repetition is bounded, so that no text costs more than its length times a constant.
_USERINFO = re.compile(r"(?<=://)[^/@\s\"'<>]{1,256}@")
_PARAMETER = re.compile(
    r"(?P<name>[?&][\w.-]{0,40}(?:token|key|secret|passw(?:or)?d|passphrase|signature|sig|credential|auth)[\w.-]{0,8}=)[^&\s\"'#]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)[ \t]{1,4})[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?P<name>\b[A-Z][A-Z0-9_]{0,40}(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS)=)[^\s\"']+")


def is_secret_variable(name: str) -> bool:
    """Whether the value of the environment variable is masked: unless its name is known to be harmless, it is."""
    if name in _HARMLESS_ENV:
        return False
    return not name.startswith(_HARMLESS_ENV_PREFIXES) or _SECRET_ENV.search(name) is not None


def masked_env(env: Mapping[str, str]) -> dict[str, str]:
    """An environment that may be shown, sorted by name."""
    return {name: MASK if is_secret_variable(name) else masked_text(value) for name, value in sorted(env.items())}


def masked_argv(argv: Sequence[str]) -> list[str]:
    """A command line that may be shown: what follows a secret flag is masked, and so are secrets in URLs."""
    return [shown for shown, _ in _words(argv)]


def secrets_in(env: Mapping[str, str], argv: Sequence[str] = ()) -> set[str]:
    """The values that must not be told, of an engine's environment and command line."""
    found = {value for name, value in env.items() if is_secret_variable(name)}
    found.update(line.strip() for value in tuple(found) for line in value.splitlines())
    for _, secret in _words(argv):
        found.add(secret)
        found.update(secret.split(","))  # several keys in one value
    for text in (*env.values(), *argv):
        for hit in _USERINFO.finditer(text):
            found.update({hit[0][:-1], hit[0][:-1].partition(":")[2]})
    return found


def named_secrets(env: Mapping[str, str], argv: Sequence[str]) -> list[str]:
    """What of an engine's environment and command line is secret: names of variables, and the flags before the values."""
    found = sorted(name for name in env if is_secret_variable(name))
    flag = ""
    for word, shown in zip(argv, masked_argv(argv), strict=True):
        if word.startswith("-"):
            flag = word.partition("=")[0]
        if shown != word:
            found.append(flag if _is_secret_flag(flag) else "an argument")
    return list(dict.fromkeys(found))


def masked_text(text: str) -> str:
    """``text`` without what its form gives away: userinfo and secret parameters of URLs, bearer tokens, assignments."""
    if "://" in text:
        text = _USERINFO.sub(MASK + "@", text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
        text = _ASSIGNED.sub(rf"\g<name>{MASK}", text)
    return _BEARER.sub(rf"\g<name>{MASK}", text)


def _words(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Each word as it may be shown, with the secret that it was; empty where it was none."""
    words: list[tuple[str, str]] = []
    taking = first = False
    for word in argv:
        name, joined, value = word.partition("=")
        if taking and (first or not word.startswith("-")):
            words.append((MASK, word))
            first = False
            continue
        taking = first = _is_secret_flag(name)
        if taking and joined:
            taking = False
            words.append((f"{name}={MASK}", value))
        else:
            words.append((masked_text(word), ""))
    return words


def _is_secret_flag(name: str) -> bool:
    bare = name.lstrip("-").lower().replace("_", "-")
    if not name.startswith("-") or _FILE_FLAG.search(bare):
        return False
    return name in _SHORT_SECRET_FLAGS or _SECRET_FLAG.search(bare) is not None


class Redactor:
    """Masks values under secret-looking keys, and the known secrets wherever they stand in a text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._by_owner: dict[str, frozenset[str]] = {}
        self._secrets: tuple[str, ...] = ()
        self.know("", secrets)

    def know(self, owner: str, secrets: Iterable[str]) -> None:
        """From now on ``secrets`` are those of ``owner`` (a pool's id), in place of what it had; none forgets it."""
        # A very short secret would blank out ordinary words; such a token is refused off loopback anyway.
        found = frozenset(filter(_is_telling, secrets))
        if found == self._by_owner.get(owner, frozenset()):
            return
        self._by_owner[owner] = found
        if not found:
            del self._by_owner[owner]
        # Longest first: a secret that holds another one must not be left in pieces.
        self._secrets = tuple(sorted(frozenset().union(*self._by_owner.values()), key=lambda s: (-len(s), s)))

    def known(self, owner: str, most: int) -> list[str]:
        """Up to ``most`` secrets of ``owner``."""
        return sorted(self._by_owner.get(owner, ()))[:most]

    def text(self, value: str) -> str:
        """``value`` without every known secret, and without what its form gives away."""
        for secret in self._secrets:
            if secret in value:
                value = value.replace(secret, MASK)
        return masked_text(value)

    def error(self, problem: PoolError) -> PoolError:
        """``problem`` itself, its texts redacted."""
        problem.message = self.text(problem.message)
        problem.args = (problem.message,)
        problem.hint = None if problem.hint is None else self.text(problem.hint)
        problem.details = self.mapping(problem.details)
        return problem

    def mapping(self, fields: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
        """A copy of ``fields`` that is safe to write down; nested maps and lists included."""
        return {str(key): self._field(str(key), value, depth) for key, value in fields.items()}

    def _field(self, key: str, value: Any, depth: int) -> Any:
        if key in _IDENTITIES and isinstance(value, str):
            return value
        plain = value is None or isinstance(value, (bool, int, float))
        if not plain and _SECRET_KEY.search(key) and not _HARMLESS_KEY.search(key):
            return MASK
        return self._value(value, depth)

    def _value(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # NaN and infinities are no JSON
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth >= _MAX_DEPTH:
            return "…"
        if isinstance(value, Mapping):
            return self.mapping(value, depth + 1)
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value(item, depth + 1) for item in value]
        return self.text(str(value))


def _is_telling(value: str) -> bool:
    """Whether masking ``value`` hides more than ordinary words, figures, indentation or a ruled line."""
    bare = value.strip()
    long = len(bare) >= MIN_SECRET_CHARS and len(set(bare)) > 2
    return long and value not in _ORDINARY and not _is_small_number(value)


def _is_small_number(text: str) -> bool:
    return len(text) < 8 and text.replace(".", "", 1).isdecimal()
