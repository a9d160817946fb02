"""Model references: every scheme of SPEC §6.2 as one frozen value with a stable id (ORCH-3090, ORCH-3704)."""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pool_managerd.errors import SpecError

MAX_REF_CHARS = 4096

_HEX = re.compile(r"[0-9a-f]{64}")
_HF_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HF_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]{0,127}))?"
    r"(?::(?P<quantisation>[A-Za-z0-9][A-Za-z0-9._-]{0,63}))?"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_OCI = re.compile(r"oci://[A-Za-z0-9.-]+(?::\d{1,5})?/[a-z0-9._/-]+(?::[\w.-]{1,128}|@sha256:[0-9a-f]{64})")
OLLAMA_REGISTRY = "registry.ollama.ai"
_OLLAMA = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9][A-Za-z0-9._-]{0,252}(?::\d{1,5})?)/)?(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]{0,79})/)?"
    r"(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]{0,79})(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
)
_LOCAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OCI_REPO = re.compile(r"oci://[A-Za-z0-9.-]+(?::\d{1,5})?/[a-z0-9._/-]+")
_QUERY = re.compile(r"sha256-[0-9a-f]{16}")
_FORMS = (
    "file:PATH, hf:ORG/REPO[@REVISION]/FILE, hf:ORG/REPO[@REVISION]:QUANTISATION, https://…, ollama:NAME[:TAG],"
    " local:NAME, s3://BUCKET/KEY, oci://REGISTRY/REPO:TAG or sha256:HEX"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed reference. ``id`` is stable: the same model is never known by two ids because of how it was spelt.

    ``location`` is the path of ``file``, the hex of ``sha256``, ``org/repo`` of ``hf``, ``host/user/name`` of ``ollama``, the
    name of ``local``, the url of the rest. ``file`` is the one inside an ``hf`` repository, of ``revision`` (empty: its main
    branch); instead of it ``quantisation`` may be what the name of a GGUF file says, in upper case. Neither: all of the
    repository. Of ``ollama`` the ``revision`` is the tag.
    """

    scheme: str
    id: str
    location: str
    file: str = ""
    revision: str = ""
    quantisation: str = ""


def parse_ref(text: str) -> ModelRef:
    """Read a reference; anything without a known prefix is a local path. Raises SpecError for a malformed one."""
    ref = text.strip()
    if not ref:
        raise _malformed(text, "it is empty")
    if len(ref) > MAX_REF_CHARS or any(ord(char) < 32 or ord(char) == 127 for char in ref):
        raise _malformed(text, "it is too long or holds control characters")
    prefix, colon, rest = ref.partition(":")
    scheme = prefix.lower() if colon else ""
    if scheme == "sha256":
        return _digest_ref(text, rest)
    if scheme == "hf":
        return _hf_ref(text, rest)
    if scheme == "ollama":
        return _ollama_ref(text, rest.removeprefix("//"))
    if scheme == "local" and not rest.startswith("//"):
        return _local_ref(text, rest)
    if scheme == "file":
        return _file_ref(text, rest.removeprefix("//") if rest.startswith("///") else rest)
    found = _SCHEME.match(ref)
    if found:
        return _url_ref(text, ref, found[1].lower())
    return _file_ref(text, ref)


def _file_ref(text: str, path: str) -> ModelRef:
    if not path:
        raise _malformed(text, "the path is missing")
    if path.startswith("//"):
        raise _malformed(text, "a host is not supported; write file:/absolute/path")
    normal = posixpath.normpath(path)
    return ModelRef("file", f"file:{normal}", normal)


def _digest_ref(text: str, rest: str) -> ModelRef:
    digest = rest.lower()
    if not _HEX.fullmatch(digest):
        raise _malformed(text, "a sha256 has 64 hexadecimal digits")
    return ModelRef("sha256", f"sha256:{digest}", digest)


def _hf_ref(text: str, rest: str) -> ModelRef:
    org, _, tail = rest.strip("/").partition("/")
    repo, _, path = tail.partition("/")
    named = _HF_REPO.fullmatch(repo)
    if named is None or not _HF_NAME.fullmatch(org):
        raise _malformed(text, "it must be hf:ORG/REPO, hf:ORG/REPO/FILE or hf:ORG/REPO:QUANTISATION")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise _malformed(text, "the file must be a plain path inside the repository")
    revision, quantisation = named["revision"] or "", (named["quantisation"] or "").upper()
    if quantisation and path:
        raise _malformed(text, "it names both a quantisation and a file")
    stable = f"hf:{org}/{named['repo']}{revision and '@'}{revision}{quantisation and ':'}{quantisation}{path and '/'}{path}"
    return ModelRef("hf", stable, f"{org}/{named['repo']}", path, revision, quantisation)


def _ollama_ref(text: str, rest: str) -> ModelRef:
    named = _OLLAMA.fullmatch(rest)
    if named is None:
        raise _malformed(text, "it must be ollama:NAME, ollama:NAME:TAG, ollama:USER/NAME:TAG or ollama:HOST/USER/NAME:TAG")
    host, user, tag = named["host"] or OLLAMA_REGISTRY, named["user"] or "library", named["tag"] or "latest"
    location = f"{host}/{user}/{named['name']}"
    short = location.removeprefix(f"{OLLAMA_REGISTRY}/").removeprefix("library/")
    return ModelRef("ollama", f"ollama:{short}:{tag}", location, revision=tag)


def _local_ref(text: str, rest: str) -> ModelRef:
    if not _LOCAL.fullmatch(rest):
        raise _malformed(text, "it must be local:NAME, of letters, digits, '.', '_' and '-'")
    return ModelRef("local", f"local:{rest}", rest)


def _url_ref(text: str, ref: str, scheme: str) -> ModelRef:
    url = f"{scheme}{ref[len(scheme) :]}".rstrip("/")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise _malformed(text, str(error)) from None
    if parts.username or parts.password:
        raise _malformed("a URL with a password", "keep credentials out of model references: they end up in logs")
    if not parts.hostname:
        raise _malformed(text, "the host is missing")
    if scheme == "s3" and not parts.path.lstrip("/"):
        raise _malformed(text, "it must be s3://BUCKET/KEY")
    if scheme == "oci" and _OCI_REPO.fullmatch(url):
        url = f"{url}:latest"
    if scheme == "oci" and not _OCI.fullmatch(url):
        raise _malformed(text, "it must be oci://REGISTRY/REPO:TAG or oci://REGISTRY/REPO@sha256:HEX")
    if scheme not in ("http", "https", "s3", "oci"):
        raise _malformed(text, f"the scheme {scheme!r} is unknown")
    return ModelRef(scheme, _told(url), url)


def _told(url: str) -> str:
    """The URL as an id, which is told to everybody: what is behind its path may be a signature, or a key."""
    path, _, secret = url.partition("?")
    if not secret or _QUERY.fullmatch(secret):
        return url
    return f"{path}?sha256-{hashlib.sha256(secret.encode()).hexdigest()[:16]}"


def _malformed(text: str, reason: str) -> SpecError:
    shown = text if len(text) <= 100 else text[:97] + "…"
    return SpecError(f"cannot use {shown!r} as a model: {reason}", hint=f"write it as {_FORMS}")
