"""How downloads reach the network: a proxy, a site's own authority, and no more of the line than they may have."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pool_managerd.errors import PoolError, SpecError
from pool_managerd.models.bandwidth import Bandwidth
from pool_managerd.models.web import trusting
from tests.gateway.certificates import certify
from tests.models.fetching import fetching
from tests.models.hub_app import Hub
from tests.models.proxy_app import proxy_to

BODY = b"GGUF\x03\x00\x00\x00 and more"
BY_NAME = {"allow_domains": ["*.invalid"]}
DIGEST = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = await Hub(files={"m.gguf": BODY}).start()
    yield made
    await made.close()


async def test_what_is_fetched_by_way_of_a_proxy_needs_no_name_here(hub: Hub, tmp_path: Path) -> None:
    async with proxy_to(hub.url) as proxy, fetching(tmp_path, proxy=proxy.url, policy=BY_NAME) as f:
        found = await f.models.ensure_present("http://models.invalid/m.gguf", DIGEST)
        assert Path(found.local_path).read_bytes() == BODY
        assert proxy.asked == ["GET http://models.invalid/m.gguf"]


async def test_what_is_encrypted_goes_through_a_proxy_as_it_is(tmp_path: Path) -> None:
    files = certify(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(files.cert, files.key)
    hub = await Hub(files={"m.gguf": BODY}).start(server)
    try:
        async with proxy_to(hub.url) as proxy, fetching(tmp_path, proxy=proxy.url, tls=trusting(files.cert)) as f:
            assert (await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)).verified
            assert proxy.asked == [f"CONNECT {hub.url.removeprefix('https://')}"]
        async with proxy_to(hub.url) as proxy, fetching(tmp_path / "b", proxy=proxy.url, tls=trusting(None)) as f:
            error = await f.refusal(f"{hub.url}/m.gguf", DIGEST)
            assert "cannot be trusted" in error.message and "models.ca_file" in (error.hint or "")
    finally:
        await hub.close()


async def test_policy_goes_by_names_where_a_proxy_looks_them_up(hub: Hub, tmp_path: Path) -> None:
    async with proxy_to(hub.url) as proxy, fetching(tmp_path, proxy=proxy.url, policy={"allow_domains": ["other.invalid"]}) as f:
        assert (await f.refusal("http://models.invalid/m.gguf", DIGEST)).code == "POLICY_DENIED"
        assert (await f.refusal("http://169.254.169.254/m.gguf", DIGEST)).code == "POLICY_DENIED"
        assert proxy.asked == []


@pytest.mark.parametrize(("status", "tries"), [(407, 1), (403, 1), (503, 3)])
async def test_a_proxy_that_refuses_is_named(hub: Hub, tmp_path: Path, status: int, tries: int) -> None:
    async with proxy_to(hub.url) as proxy, fetching(tmp_path, proxy=proxy.url, policy=BY_NAME, tries=3) as f:
        proxy.refuses = status
        error = await f.refusal("https://models.invalid/m.gguf", DIGEST)
        assert f"models.proxy {proxy.url} answers {status}" in error.message and len(proxy.asked) == tries


async def test_a_proxy_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with fetching(tmp_path, proxy="http://127.0.0.1:9", policy=BY_NAME, tries=2) as f:
        error = await f.refusal("http://models.invalid/m.gguf", DIGEST)
        assert "models.proxy http://127.0.0.1:9 cannot be reached" in error.message


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), ("no certificate", "there is no certificate in it")])
def test_a_file_of_authorities_that_has_none_is_named(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=why) as caught:
        trusting(path)
    assert caught.value.code == "CONFIG_ERROR" and isinstance(caught.value, PoolError)


async def test_all_downloads_together_take_as_long_as_the_bandwidth_says_and_idle_time_is_no_credit() -> None:
    now = [1000.0]

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    waited: list[float] = []
    line = Bandwidth(1000, lambda: now[0], sleep)
    await line.spend(500)
    await line.spend(1500)  # of another download, meanwhile
    now[0] += 3600.0
    await line.spend(1000)
    assert waited == pytest.approx([0.5, 2.0, 1.0])
    await Bandwidth(None, lambda: now[0], sleep).spend(1 << 40)
    assert len(waited) == 3


async def test_a_download_keeps_to_the_bandwidth(hub: Hub, tmp_path: Path) -> None:
    spent: list[int] = []

    async with fetching(tmp_path, bytes_per_s=1 << 30) as f:
        spend = f.web.bandwidth.spend

        async def noted(count: int) -> None:
            spent.append(count)
            await spend(count)

        f.web.bandwidth.spend = noted  # type: ignore[method-assign]
        await f.models.ensure_present(f"{hub.url}/m.gguf", DIGEST)
    assert sum(spent) == len(BODY)
