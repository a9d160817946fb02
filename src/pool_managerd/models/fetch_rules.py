"""From where a model may be fetched (`policy`): asked before anything is sent, and again for each redirect."""

from __future__ import annotations

from yarl import URL

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.addresses import is_address, is_public
from pool_managerd.models.refs import ModelRef

FETCHED = ("hf", "https", "http", "oci", "s3")
"""Schemes that this version can fetch."""


NEVER_FETCHED = ("ollama", "local", "sha256")
"""Schemes of what is on this machine or is an error: `models.elsewhere`, and what was imported, decide."""


def check_scheme(policy: PolicyConfig, model: ModelRef) -> None:
    """Whether models may have that scheme at all. Raises SpecError POLICY_DENIED."""
    if model.scheme not in policy.allow_schemes and model.scheme not in NEVER_FETCHED:
        allowed = ", ".join(policy.allow_schemes) or "none"
        hint = f"add {model.scheme} to policy.allow_schemes"
        if model.scheme in FETCHED and not policy.allow_network:
            hint += ", and set policy.allow_network: true"
        raise denied(model.id, f"the scheme {model.scheme!r} is not allowed (allowed: {allowed})", hint)


def check_network(policy: PolicyConfig, model: ModelRef) -> None:
    """Whether it may be fetched. Raises SpecError POLICY_DENIED."""
    check_scheme(policy, model)
    if not policy.allow_network:
        raise denied(model.id, "the network may not be used", "set policy.allow_network: true")


def check_url(policy: PolicyConfig, url: URL, before: URL | None = None) -> None:
    """Whether ``url`` may be asked; ``before`` is what it was redirected from. Raises SpecError POLICY_DENIED.

    The addresses that its host has are checked where it is connected to.
    """
    what, host = shown(url), url.host or ""
    if before is not None and before.scheme == "https" and url.scheme != "https":
        raise denied(what, f"{before.host} redirects from https to {url.scheme}", "fetch it from somewhere else")
    if url.scheme not in ("http", "https") or not host:
        raise denied(what, f"{url.scheme or 'no scheme'} is not http or https")
    if url.scheme == "http" and "http" not in policy.allow_schemes:
        raise denied(what, "it is not encrypted", "use https, or add http to policy.allow_schemes")
    if url.user or url.password:
        raise denied(what, "it has credentials in it")
    if policy.allow_domains and not _is_allowed(policy, host):
        raise denied(what, f"the host {host} is not in policy.allow_domains", f"add {host} to policy.allow_domains")
    if is_address(host) and not is_public(host) and not is_listed(policy, host):
        raise denied(what, f"{host} is not a public address", f"add {host} to policy.allow_domains if it is meant")


def is_listed(policy: PolicyConfig, host: str) -> bool:
    """Whether the host is named in ``allow_domains`` itself: then it may have any address, this machine's included."""
    return host.lower() in {name.lower() for name in policy.allow_domains}


def _is_allowed(policy: PolicyConfig, host: str) -> bool:
    below = tuple(name[1:].lower() for name in policy.allow_domains if name.startswith("*."))
    return is_listed(policy, host) or (bool(below) and host.lower().endswith(below))


def shown(url: URL) -> str:
    """The URL as it may be told: what is behind its path may be a signature that gives access."""
    return str(url.with_query(None).with_fragment(None).with_user(None)) if url.host else str(url)[:200].partition("?")[0]


def denied(what: str, why: str, hint: str | None = None) -> SpecError:
    return SpecError(f"cannot fetch {what}: policy: {why}", code="POLICY_DENIED", status=403, hint=hint)
