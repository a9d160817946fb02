"""From where nothing is fetched: what the policy does not allow, and what a redirect must not reach."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.addresses import AddressRefusedError, PublicResolver, is_public
from pool_managerd.models.fetch_rules import check_url
from tests.gateway.certificates import certify
from tests.models.fetching import LOOPBACK, fetching
from tests.models.hub_app import Hub, redirect

BODY = b"GGUF\x03\x00\x00\x00 and more"
OPEN = PolicyConfig(allow_network=True, allow_schemes=("https", "hf"))


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files={"m.gguf": BODY}).start()
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("url", "policy", "why"),
    [
        ("http://example.com/m", {}, "not encrypted"),
        ("ftp://example.com/m", {}, "not http or https"),
        ("https://u:p@example.com/m", {}, "credentials"),
        ("https://10.0.0.1/m", {}, "not a public address"),
        ("https://[::1]/m", {}, "not a public address"),
        ("https://[::ffff:127.0.0.1]/m", {}, "not a public address"),
        ("https://169.254.169.254/latest", {}, "not a public address"),
        ("https://other.example/m", {"allow_domains": ("models.example",)}, "not in policy.allow_domains"),
        ("https://evilmodels.example/m", {"allow_domains": ("*.models.example",)}, "not in policy.allow_domains"),
        ("https://10.0.0.1/m", {"allow_domains": ("*.0.0.1",)}, "not a public address"),
    ],
)
def test_what_may_not_be_asked(url: str, policy: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why) as caught:
        check_url(OPEN.model_copy(update=policy), URL(url))
    assert caught.value.code == "POLICY_DENIED" and "p@" not in caught.value.message


@pytest.mark.parametrize("domains", [(), ("models.example",), ("*.example",), ("MODELS.example",)])
def test_what_may_be_asked(domains: tuple[str, ...]) -> None:
    check_url(OPEN.model_copy(update={"allow_domains": domains}), URL("https://models.example/m?x=1"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1",
        "::", "fe80::1%lo", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::10.0.0.1", "ff02::1", "255.255.255.255",
    ],
)  # fmt: skip
def test_addresses_that_no_name_may_lead_to(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


async def test_a_name_that_leads_into_this_machine_is_not_connected_to(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(AddressRefusedError, match="not a public address"):
        await PublicResolver(lambda _: False).resolve("localhost", 1)
    async with fetching(tmp_path, policy={"allow_domains": []}) as f:
        for host in ("localhost", "127.0.0.1"):
            error = await f.refusal(f"http://{host}:{URL(hub.url).port}/m.gguf")
            assert error.code == "POLICY_DENIED" and "not a public address" in error.message, host
        await f.refusal(f"http://2130706433:{URL(hub.url).port}/m.gguf")
    assert hub.asked == []


async def test_a_name_that_can_be_none_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(OSError, match="no name of a host"):
        await PublicResolver(lambda _: False).resolve("a" * 70, 1)


async def test_a_host_that_is_listed_may_have_any_address(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, policy={"allow_domains": ["localhost"]}) as f:
        assert (await f.models.ensure_present(f"http://localhost:{URL(hub.url).port}/m.gguf")).size_bytes == len(BODY)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://10.0.0.1/m", "10.0.0.1 is not in policy.allow_domains"), ("ftp://127.0.0.1/", "not http or https"),
        ("http://u:secret@127.0.0.1/m", "credentials"), ("/again", "redirected more than 8 times"),
        ("http://127.0.0.1:99999999/m", "redirects to what is no address"),
    ],
)  # fmt: skip
async def test_each_redirect_is_checked(hub: Hub, tmp_path: Path, target: str, why: str) -> None:
    hub.script = [redirect(target)] * 20
    async with fetching(tmp_path) as f:
        error = await f.refusal(f"{hub.url}/m.gguf")
        assert why in error.message and "secret" not in error.message


async def test_https_is_checked_and_never_left_for_http(hub: Hub, tmp_path: Path) -> None:
    files = certify(tmp_path / "tls")
    secure = await Hub(files={"m.gguf": BODY}).start(files.context())
    trusting = ssl.create_default_context(cafile=str(files.cert))
    try:
        async with fetching(tmp_path, tls=trusting) as f:
            assert (await f.models.ensure_present(f"{secure.url}/m.gguf")).size_bytes == len(BODY)
            secure.script = [redirect(f"{hub.url}/m.gguf")]
            assert "redirects from https to http" in (await f.refusal(f"{secure.url}/other.gguf")).message
        async with fetching(tmp_path / "other") as f:
            error = await f.refusal(f"{secure.url}/m.gguf")
            assert "cannot be trusted" in error.message and not error.retriable
    finally:
        await secure.close()
    assert hub.asked == []


@pytest.mark.parametrize(
    ("policy", "why", "remedy"),
    [
        ({"allow_network": False}, "the network may not be used", "policy.allow_network: true"),
        ({"allow_schemes": ["file"]}, "the scheme 'http' is not allowed", "policy.allow_schemes"),
    ],
)
async def test_nothing_is_asked_without_the_policys_leave(
    hub: Hub, tmp_path: Path, policy: dict[str, Any], why: str, remedy: str
) -> None:
    async with fetching(tmp_path, policy=policy) as f:
        error = await f.refusal(f"{hub.url}/m.gguf")
        assert why in error.message and remedy in (error.hint or "") and error.code == "POLICY_DENIED"
    assert hub.asked == [] and LOOPBACK["allow_network"]
