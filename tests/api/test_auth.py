"""Who may call: the token, loopback, Host and Origin (FAULTS I1, I3)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.api.auth import Access, Token, readable_token_file, resolve_access
from pool_managerd.config import AuthConfig, Config, DaemonConfig
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.httpd.peers import is_loopback
from tests.api.conftest import close, serve
from tests.api.fake_node import FakeNode

SECRET = "s3cret-token-of-more-than-32-characters"
DIGEST = Token(SECRET).digest


def config(bind: str = "127.0.0.1:9200", token_file: Path | None = None) -> Config:
    return Config(daemon=DaemonConfig(bind=bind), auth=AuthConfig(token_file=token_file))


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "MISSING_TOKEN"),
        ("", "MISSING_TOKEN"),
        ("Bearer", "MISSING_TOKEN"),
        ("Bearer   ", "MISSING_TOKEN"),
        (f"Basic {SECRET}", "MISSING_TOKEN"),
        ("Bearer wrong", "BAD_TOKEN"),
        (f"Bearer {SECRET[:-1]}", "BAD_TOKEN"),
        (f"Bearer {SECRET}x", "BAD_TOKEN"),
        (f"Bearer {SECRET.upper()}", "BAD_TOKEN"),
    ],
)
def test_a_request_without_the_right_token_is_a_401(header: str | None, code: str) -> None:
    access = Access("127.0.0.1", DIGEST)
    with pytest.raises(RequestError) as caught:
        access.check_token(header, peer_is_loopback=True)
    assert (caught.value.status, caught.value.code) == (401, code)
    assert caught.value.details["auth_code"] == {"MISSING_TOKEN": 40101, "BAD_TOKEN": 40102}[code]
    assert SECRET[:8] not in str(caught.value.message)


@pytest.mark.parametrize("header", [f"Bearer {SECRET}", f"bearer  {SECRET} "])
def test_the_right_token_passes(header: str) -> None:
    Access("0.0.0.0", DIGEST).check_token(header, peer_is_loopback=False)


def test_auth_optional_lets_only_loopback_peers_skip() -> None:
    access = Access("0.0.0.0", DIGEST, optional_on_loopback=True)
    access.check_token(None, peer_is_loopback=True)
    with pytest.raises(RequestError):
        access.check_token(None, peer_is_loopback=False)


async def test_only_health_ready_and_metrics_are_open_when_a_token_is_set() -> None:
    served = await serve(FakeNode(), Access("127.0.0.1", DIGEST))
    try:
        for path in ("/health", "/ready", "/v1/health", "/v2/ready"):
            assert (await served.call("GET", path))[0] == 200
        for path in ("/v1/pools", "/pools/demo/status", "/openapi.json", "/v1/events", "/nothing", "/v1/health/../pools"):
            async with served.session.get(served.url + path) as response:
                assert (response.status, response.headers["WWW-Authenticate"]) == (401, 'Bearer realm="pool-managerd"'), path
                assert (await response.json())["code"] == "MISSING_TOKEN"
        status, _ = await served.call("GET", "/v1/pools", headers={"Authorization": f"Bearer {SECRET}"})
        assert status == 200
    finally:
        await close(served)


@pytest.mark.parametrize("host", ["localhost", "localhost:9200", "127.0.0.1:9", "127.8.8.8", "[::1]:9200", "LOCALHOST"])
def test_loopback_names_pass_the_host_check(host: str) -> None:
    Access("127.0.0.1").check_browser(host, None)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9200", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "localhost:x", "", "[::1"]
)
def test_a_rebound_name_is_refused_on_loopback_and_not_elsewhere(host: str) -> None:
    with pytest.raises(RequestError) as caught:
        Access("127.0.0.1").check_browser(host, None)
    assert caught.value.status == 421
    Access("0.0.0.0", DIGEST).check_browser(host, None)


def test_another_origin_is_refused_and_the_own_is_not() -> None:
    access = Access("127.0.0.1")
    access.check_browser("localhost:9200", "http://localhost:9200")
    for origin in ("http://evil.example", "null", "http://localhost:9201", "", "http://localhost:9200.evil.example"):
        with pytest.raises(RequestError) as caught:
            access.check_browser("localhost:9200", origin)
        assert caught.value.status == 403


def test_a_request_that_a_page_of_another_site_made_is_refused_without_an_origin_too() -> None:
    access = Access("127.0.0.1")
    for site in (None, "same-origin", "none"):
        access.check_browser("localhost:9200", None, site)
    for site in ("cross-site", "same-site", "Cross-Site", "odd"):
        with pytest.raises(RequestError) as caught:
            access.check_browser("localhost:9200", None, site)
        assert caught.value.code == "ORIGIN_REFUSED"


async def test_no_answer_allows_another_origin() -> None:
    served = await serve(FakeNode())
    try:
        for method in ("OPTIONS", "GET", "POST"):
            headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
            async with served.session.request(method, served.url + "/v1/pools/demo/stop", headers=headers) as response:
                assert response.status == 403
                assert not [name for name in response.headers if name.lower().startswith("access-control")]
        assert served.node.calls == []
    finally:
        await close(served)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "::ffff:127.0.0.1")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "128.0.0.1", "localhost.evil")),
    ],
)
def test_loopback_is_recognised_in_all_its_forms(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("bind", ["0.0.0.0:9200", "[::]:9200", "10.0.0.1:9200", "node.example:9200"])
def test_off_loopback_without_a_token_is_refused_with_the_remedy(bind: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_access(config(bind), {})
    assert caught.value.code == "NON_LOOPBACK_WITHOUT_TOKEN"
    assert "auth.token_file" in (caught.value.hint or "")
    with pytest.raises(SpecError, match="fewer than 32"):
        resolve_access(config(bind), {"AUTH_TOKEN": "short"})
    access, token = resolve_access(config(bind), {"AUTH_TOKEN": SECRET})
    assert token is not None
    assert access.token_digest == DIGEST


def test_the_token_comes_from_a_file_or_either_variable_and_they_must_agree(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET + "\nanother line\n")
    for cfg, env in (
        (config(token_file=file), {}),
        (config(), {"LLORCH_API_TOKEN": SECRET}),
        (config(), {"AUTH_TOKEN": f" {SECRET} "}),
    ):
        assert resolve_access(cfg, env)[0].token_digest == DIGEST
    assert resolve_access(config(), {})[0].token_digest is None
    for cfg, env in (
        (config(), {"AUTH_TOKEN": SECRET, "LLORCH_API_TOKEN": "other"}),
        (config(token_file=file), {"AUTH_TOKEN": "other"}),
    ):
        with pytest.raises(SpecError, match="differ") as caught:
            resolve_access(cfg, env)
        assert SECRET not in caught.value.message


@pytest.mark.parametrize("content", ["", "\n", "two words\n", "\x07bell"])
def test_an_unusable_token_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(SpecError, match="cannot use"):
        resolve_access(config(token_file=file), {})
    with pytest.raises(SpecError, match=r"cannot read auth\.token_file"):
        resolve_access(config(token_file=tmp_path / "missing"), {})


def test_a_token_never_shows_itself() -> None:
    token = Token(SECRET)
    assert SECRET not in repr(token)
    assert SECRET not in repr(Access("127.0.0.1", token.digest))
    assert len(token.fp6) == 6


def test_a_token_file_that_others_may_write_is_refused_and_one_that_they_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    file.chmod(0o600)
    assert readable_token_file(config(token_file=file)) is None
    file.chmod(0o644)
    assert readable_token_file(config(token_file=file)) == file
    file.chmod(0o666)
    with pytest.raises(SpecError, match="other users may write") as caught:
        resolve_access(config(token_file=file), {})
    assert "chmod 600" in (caught.value.hint or "")
