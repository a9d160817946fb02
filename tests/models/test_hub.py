"""Models by their names on a hub: what a name stands for, what is verified, and who gets to see the token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from yarl import URL

from pool_managerd.errors import SpecError
from pool_managerd.models.hub_access import HubAccess
from tests.models.fetching import fetching
from tests.models.hub_app import COMMIT, Hub, redirect
from tests.models.test_gguf_header import write_split

SMALL, LARGE = b"GGUF\x03\x00\x00\x00small", b"GGUF\x03\x00\x00\x00large" * 1000


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    files = {"README.md": b"#", "m-Q4_K_M.gguf": SMALL, "sub/m-Q8_0.gguf": LARGE, "mmproj-m-Q8_0.gguf": b"GGUF"}
    made = await Hub(files=files).start()
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("ref", "content"),
    [
        ("hf:org/repo/m-Q4_K_M.gguf", SMALL), ("hf:org/repo:q4_k_m", SMALL), ("hf:org/repo@v1:Q8_0", LARGE),
        ("hf:org/repo@main/sub/m-Q8_0.gguf", LARGE),
    ],
)  # fmt: skip
async def test_a_name_on_the_hub_is_a_verified_file(hub: Hub, tmp_path: Path, ref: str, content: bytes) -> None:
    async with fetching(tmp_path, hub.url) as f:
        model = await f.models.ensure_present(ref)
        assert Path(model.local_path).read_bytes() == content and COMMIT in model.local_path
        assert model.verified and model.digest == "sha256:" + hashlib.sha256(content).hexdigest()
        assert hub.asked[0].path == f"/api/models/org/repo/revision/{'v1' if '@v1' in ref else 'main'}"


async def test_two_names_of_one_file_are_one_download(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        first = await f.models.ensure_present("hf:org/repo/m-Q4_K_M.gguf")
        second = await f.models.ensure_present("hf:org/repo:Q4_K_M")
        assert first.local_path == second.local_path and second.verified
    assert len([asked for asked in hub.asked if "resolve" in asked.path]) == 1


async def test_all_parts_of_a_split_model_are_fetched(hub: Hub, tmp_path: Path, tiny_model: Path) -> None:
    hub.files = {f"big/{path.name}": path.read_bytes() for path in write_split(tmp_path, tiny_model)}
    name = next(iter(hub.files))
    async with fetching(tmp_path, hub.url) as f:
        model = await f.models.ensure_present(f"hf:org/repo/{name}")
        assert [Path(path).read_bytes() for path in model.files] == list(hub.files.values())
        assert model.verified and model.digest is not None and model.digest.count(",") == 2
        other = name.replace("-00001-of", "-00002-of")
        assert "one of 3 parts" in (await f.refusal(f"hf:org/repo/{other}")).message
        again = await f.models.ensure_present(f"{hub.url}/{name}")
        assert [Path(path).name for path in again.files] == [Path(path).name for path in model.files]


@pytest.mark.parametrize(
    ("ref", "why"),
    [
        ("hf:org/repo", "no safetensors weights in it"), ("hf:org/repo:Q2_K", "no model in it is named so"),
        ("hf:org/repo:m", "2 models in it are named so"), ("hf:org/repo/none.gguf", "there is no none.gguf in it"),
    ],
)  # fmt: skip
async def test_what_does_not_name_one_model_is_answered_with_what_there_is(hub: Hub, tmp_path: Path, ref: str, why: str) -> None:
    async with fetching(tmp_path, hub.url) as f:
        error = await f.refusal(ref)
        assert why in error.message and (error.hint or "").endswith("it has: m-Q4_K_M.gguf, sub/m-Q8_0.gguf")


async def test_a_file_that_is_not_what_the_hub_said_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.digests["m-Q4_K_M.gguf"] = "0" * 64
    async with fetching(tmp_path, hub.url) as f:
        assert (await f.refusal("hf:org/repo/m-Q4_K_M.gguf")).code == "DIGEST_MISMATCH"
        asked = len(hub.asked)
        error = await f.refusal("hf:org/repo/sub/m-Q8_0.gguf", "sha256:" + "1" * 64)
        assert error.code == "DIGEST_MISMATCH" and len(hub.asked) == asked + 1, "known before a byte of it is fetched"


async def test_the_token_is_for_the_hub_and_for_nobody_that_it_redirects_to(hub: Hub, tmp_path: Path) -> None:
    away = await Hub(files={"blob": SMALL}).start()
    hub.token = "hf_secret_of_mine"
    hub.script = [redirect(f"{away.url}/blob?signature=s3cr3t")]
    try:
        async with fetching(tmp_path, hub.url, token=hub.token) as f:
            assert (await f.models.ensure_present("hf:org/repo:Q4_K_M")).verified
        async with fetching(tmp_path / "without", hub.url) as f:
            error = await f.refusal("hf:org/repo:Q4_K_M")
            assert "HF_TOKEN" in (error.hint or "") and error.status == 403
    finally:
        await away.close()
    assert {asked.authorization for asked in hub.asked[:2]} == {"Bearer hf_secret_of_mine"}
    assert [asked.authorization for asked in away.asked] == [None]
    assert "hf_secret" not in repr(HubAccess(token=hub.token))


async def test_a_signature_is_not_told(hub: Hub, tmp_path: Path) -> None:
    hub.script = [redirect(f"{hub.url}/none?signature=s3cr3t")] * 9
    async with fetching(tmp_path, hub.url) as f:
        error = await f.refusal("hf:org/repo:Q4_K_M")
        assert "s3cr3t" not in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"sha": "x", "siblings": []}', json.dumps({"sha": COMMIT, "siblings": [{}]}).encode(), b"[" * 100_000],
)
async def test_a_hub_that_answers_nonsense_is_an_error(tmp_path: Path, body: bytes) -> None:
    async def nonsense(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body)

    odd = web.Application()
    odd.router.add_get("/{path:.*}", nonsense)
    runner = web.AppRunner(odd)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with fetching(tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}") as f:
            assert "cannot be read" in (await f.refusal("hf:org/repo/m.gguf")).message
    finally:
        await runner.cleanup()


async def test_names_that_lead_out_of_the_cache_are_not_in_the_list(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"../../escape.gguf": SMALL, "/etc/m.gguf": SMALL, "a\\b.gguf": SMALL, "ok.gguf": SMALL}
    async with fetching(tmp_path, hub.url) as f:
        error = await f.refusal("hf:org/repo:Q1")
        assert error.hint == "it has: ok.gguf"


@pytest.mark.parametrize("text", ["ftp://x", "not an address", "https://u:p@h", "https://h?x=1", "http://"])
def test_an_endpoint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="HF_ENDPOINT"):
        HubAccess.of({"HF_ENDPOINT": text})


def test_the_hub_is_the_usual_one_unless_the_environment_says_otherwise() -> None:
    assert str(HubAccess.of({}).endpoint).rstrip("/") == "https://huggingface.co"
    found = HubAccess.of({"HF_ENDPOINT": "https://mirror.example/hub/", "HF_TOKEN": " hf_x "})
    assert (str(found.endpoint), found.token) == ("https://mirror.example/hub", "hf_x")


def test_the_login_of_the_hubs_own_programs_is_used_where_the_environment_has_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_login\n")
    home = {"HF_HOME": str(tmp_path)}
    assert HubAccess.of(home).token == HubAccess.of({"HF_TOKEN_PATH": str(tmp_path / "token")}).token == "hf_login"
    assert HubAccess.of(home | {"HF_TOKEN": "hf_own"}).token == "hf_own"
    assert HubAccess.of(home | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}).token is None
    (tmp_path / "token").write_bytes(b"\xff\n")
    assert HubAccess.of(home).token is None and HubAccess.of({}).token is None


async def test_a_hub_that_is_not_to_be_asked_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    async with fetching(tmp_path, hub.url) as f:
        f.web.hub = HubAccess(URL(hub.url), offline=HubAccess.of({"HF_HUB_OFFLINE": "1"}).offline)
        error = await f.refusal("hf:org/repo/m.gguf")
        assert error.code == "POLICY_DENIED" and "HF_HUB_OFFLINE" in error.message and hub.asked == []
