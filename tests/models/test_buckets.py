"""Models in buckets: where they are, and what is signed is signed as the other end works it out."""

from __future__ import annotations

import hashlib
import hmac
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from pool_managerd.errors import SpecError
from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.refs import parse_ref
from tests.models.fetching import fetching
from tests.models.hub_app import Hub, redirect

BODY = b"GGUF\x03\x00\x00\x00 and more"
S3 = {"allow_schemes": ["s3", "http"]}
KEYS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-west-1"}


def signature(request: web.Request, secret: str = KEYS["AWS_SECRET_ACCESS_KEY"]) -> str:
    """Of a presigned GET, by the rules of AWS's signature version 4."""
    query = dict(request.query)
    query.pop("X-Amz-Signature", None)
    told = "&".join(f"{quote(key, safe='')}={quote(query[key], safe='')}" for key in sorted(query))
    canonical = f"GET\n{request.rel_url.raw_path}\n{told}\nhost:{request.host}\n\nhost\nUNSIGNED-PAYLOAD"
    scope = query["X-Amz-Credential"].partition("/")[2]
    to_sign = f"AWS4-HMAC-SHA256\n{query['X-Amz-Date']}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.new(key, to_sign.encode(), "sha256").hexdigest()


@pytest.fixture
async def store() -> AsyncIterator[Hub]:
    made = await Hub(files={"models/a dir/m+1.gguf": BODY}).start()
    yield made
    await made.close()


def signed_only(store: Hub) -> list[str]:
    """What it was asked with; an object is for those alone whose signature is right."""
    seen = list[str]()

    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(request.query.get("X-Amz-Signature", ""))
        right = "X-Amz-Signature" in request.query and seen[-1] == signature(request)
        return web.Response(body=BODY, headers={"ETag": '"1"'}) if right else web.Response(status=403)

    store.script = [answer] * 9
    return seen


async def test_an_object_is_fetched_with_an_address_that_is_signed_anew_each_time(
    store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    seen = signed_only(store)
    access = BucketAccess.of(KEYS | {"AWS_ENDPOINT_URL": store.url})
    async with fetching(tmp_path, policy=S3, buckets=access) as f:
        found = await f.models.ensure_present("s3://models/a dir/m+1.gguf")
        assert Path(found.local_path).read_bytes() == BODY and Path(found.local_path).name == "m_1.gguf"
    assert len(seen) == 1 and seen[0]


async def test_a_signature_is_shown_to_the_bucket_alone_and_in_no_error(
    store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    elsewhere = await Hub(files={"x": BODY}).start()
    try:
        store.script = [redirect(f"{elsewhere.url}/x"), hub_answer(403)]
        access = BucketAccess.of(KEYS | {"AWS_ENDPOINT_URL_S3": store.url})
        async with fetching(tmp_path, policy=S3, buckets=access) as f:
            await f.models.ensure_present("s3://models/m.gguf")
            assert [one.path for one in elsewhere.asked] == ["/x"]
            error = await f.refusal("s3://models/n.gguf")
            assert (
                error.status == 403 and "AWS_ACCESS_KEY_ID" in (error.hint or "") and "Amz" not in f"{error.message} {error.hint}"
            )
    finally:
        await elsewhere.close()


def hub_answer(status: int) -> Any:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    return answer


async def test_what_is_open_to_everybody_needs_no_credentials_and_what_is_not_says_so(store: Hub, tmp_path: Path) -> None:
    access = BucketAccess.of({"AWS_ENDPOINT_URL": store.url + "/"})
    async with fetching(tmp_path, policy=S3, buckets=access) as f:
        await f.models.ensure_present("s3://models/a dir/m+1.gguf")
        store.script = [hub_answer(403)]
        assert "extra `s3`" in ((await f.refusal("s3://models/private.gguf")).hint or "")


async def test_without_the_extra_credentials_are_not_passed_over_in_silence(
    store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    async with fetching(tmp_path, policy=S3, buckets=BucketAccess.of(KEYS | {"AWS_ENDPOINT_URL": store.url})) as f:
        error = await f.refusal("s3://models/a dir/m+1.gguf")
        assert "pool-managerd[s3]" in (error.hint or "") and store.asked == []


@pytest.mark.parametrize(
    ("env", "ref", "address"),
    [
        ({}, "s3://models/a/m.gguf", "https://models.s3.us-east-1.amazonaws.com/a/m.gguf"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "s3://my.models/m.gguf", "https://s3.eu-west-1.amazonaws.com/my.models/m.gguf"),
        ({"AWS_ENDPOINT_URL": "http://minio:9000/"}, "s3://models/a b?c#d.gguf", "http://minio:9000/models/a%20b%3Fc%23d.gguf"),
    ],
)
def test_where_an_object_is(env: dict[str, str], ref: str, address: str) -> None:
    assert str(BucketAccess.of(env).address(parse_ref(ref))) == address


@pytest.mark.parametrize("ref", ["s3://models/../m.gguf", "s3://models/a/./m.gguf"])
def test_a_key_that_leads_elsewhere_is_refused(ref: str) -> None:
    with pytest.raises(SpecError, match="part"):
        BucketAccess().address(parse_ref(ref))


@pytest.mark.parametrize("said", ["minio:9000", "ftp://minio", "http://", "http://u:p@minio", "http://[::"])
def test_an_address_of_buckets_that_is_none_is_an_error(said: str) -> None:
    with pytest.raises(SpecError, match="AWS_ENDPOINT_URL") as caught:
        BucketAccess.of({"AWS_ENDPOINT_URL": said})
    assert "u:p" not in caught.value.message


def test_instance_roles_and_open_buckets_are_asked_for_by_name() -> None:
    assert BucketAccess.of({"AWS_METADATA_ENDPOINT": "http://169.254.169.254"}).signs
    assert not BucketAccess.of(KEYS | {"AWS_SKIP_SIGNATURE": "true"}).signs and not BucketAccess.of({}).signs
