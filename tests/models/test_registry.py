"""Models from container registries: artifacts as several tools package them, and who gets to see a token."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.errors import PoolError
from pool_managerd.models.refs import parse_ref
from pool_managerd.models.registry import _MACHINES, _layer, confined, repository_of
from pool_managerd.models.registry_access import _is_of, logins_of
from tests.models.fetching import fetching
from tests.models.registry_app import DOCKER_GGUF, Registry, digest_of

BODY = b"GGUF\x03\x00\x00\x00 and more"
RAW = "application/vnd.cncf.model.weight.v1.raw"
MODEL = parse_ref("oci://r/m:1")
OCI = {"allow_schemes": ["oci", "http"]}
LOGIN = "Basic " + base64.b64encode(b"me:secret").decode()


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made = await Registry().start()
    yield made
    await made.close()


async def fetched(tmp_path: Path, ref: str, **how: Any) -> Path:
    async with fetching(tmp_path, policy=OCI, **how) as f:
        found = await f.models.ensure_present(ref)
        assert found.verified
        return Path(found.local_path)


async def test_what_docker_packages_is_fetched_and_verified(registry: Registry, tmp_path: Path) -> None:
    licence = (b"do as you like", "application/vnd.docker.ai.license", None)
    projector = (b"GGUF projector", "application/vnd.docker.ai.mmproj", "mmproj.gguf")
    digest = registry.put("135M", licence, (BODY, DOCKER_GGUF, None), projector)
    path = await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:135M")
    assert path.read_bytes() == BODY and path.name == "tiny.gguf" and digest.removeprefix("sha256:")[:40] in str(path)
    pinned = await fetched(tmp_path / "pinned", f"oci://{registry.host}/ai/tiny@{digest}")
    assert pinned.read_bytes() == BODY


@pytest.mark.parametrize("name", ["/home/somebody/models/m.gguf", "../../m.gguf", "m.gguf"])
async def test_what_modelpack_packages_has_its_name_without_the_way_there(registry: Registry, tmp_path: Path, name: str) -> None:
    registry.put("latest", (b"{}", "application/vnd.cncf.model.doc.v1.raw", "README.md"), (BODY, RAW, name), index=True)
    path = await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:latest")
    assert path.name == "m.gguf" and path.read_bytes() == BODY


@pytest.mark.parametrize("named", [True, False])
async def test_all_parts_of_a_split_model_are_there_under_names_that_engines_find(
    registry: Registry, tmp_path: Path, *, named: bool
) -> None:
    parts = [BODY + bytes([n]) for n in range(3)]
    names = [f"big-{n:05d}-of-00003.gguf" if named else None for n in (1, 2, 3)]
    registry.put("big", *((part, DOCKER_GGUF, name) for part, name in zip(parts, names, strict=True)))
    path = await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:big")
    stem = "big" if named else "tiny"
    assert [(path.parent / f"{stem}-{n:05d}-of-00003.gguf").read_bytes() for n in (1, 2, 3)] == parts


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([(b"MIT", "application/vnd.docker.ai.license", None), (b"x", RAW, "model.onnx")], "no layer of it is a model"),
        ([(b"{}", RAW, "config.json"), (b"PK", RAW, "pytorch_model.bin")], "its weights are pickles"),
        ([(b"1", RAW, "a/model.safetensors"), (b"2", RAW, "/a/model.safetensors")], "several files called a/model.safetensors"),
        ([(b"1", RAW, f"{way}/{name}") for way in "ab" for name in ("config.json", "m.safetensors")], "it has 2 models: a, b"),
        ([(b"1", RAW, "model.safetensors")], "there is no config.json in it"),
        ([(b"tar", "application/vnd.cncf.model.weight.v1.tar+zstd", None)], "is compressed with zstd"),
        ([(BODY, RAW, "a.gguf"), (BODY + b"2", RAW, "b.gguf")], "it has 2 models: a.gguf, b.gguf"),
    ],
)
async def test_what_is_no_one_model_is_said(registry: Registry, tmp_path: Path, layers: Any, why: str) -> None:
    registry.put("odd", *layers)
    async with fetching(tmp_path, policy=OCI) as f:
        assert why in (await f.refusal(f"oci://{registry.host}/ai/tiny:odd")).message


@pytest.mark.parametrize(
    "manifest",
    [b"not json", b"[]", b'{"layers": []}', b'{"layers": [{"digest": "md5:0", "size": 1}]}', b'{"layers": [7]}',
     b'{"layers": [{"digest": "sha256:%s", "size": -1}]}' % (b"0" * 64), b'{"manifests": [{}, {}]}', b"[" * 100_000],
)  # fmt: skip
async def test_a_manifest_that_is_none_is_an_error_that_names_the_model(
    registry: Registry, tmp_path: Path, manifest: bytes
) -> None:
    registry.manifests["odd"] = manifest
    async with fetching(tmp_path, policy=OCI, tries=1) as f:
        assert f"{registry.host}/ai/tiny:odd" in (await f.refusal(f"oci://{registry.host}/ai/tiny:odd")).message


async def test_a_manifest_that_is_not_the_one_of_its_digest_is_refused(registry: Registry, tmp_path: Path) -> None:
    digest = registry.put("1", (BODY, DOCKER_GGUF, None))
    registry.manifests[digest] = registry.manifests["1"] + b" "
    async with fetching(tmp_path, policy=OCI) as f:
        assert (await f.refusal(f"oci://{registry.host}/ai/tiny@{digest}")).code == "DIGEST_MISMATCH"


async def test_code_that_a_layer_names_is_for_policy_to_allow(registry: Registry, tmp_path: Path) -> None:
    config = b'{"auto_map": {"AutoModel": "evil.Model"}}'
    registry.put("1", (config, RAW, "config.json"), (b"{}", RAW, "model.safetensors"), (b"import os", RAW, "evil.py"))
    async with fetching(tmp_path / "a", policy=OCI) as f:
        problem = await f.refusal(f"oci://{registry.host}/ai/tiny:1")
        assert problem.code == "POLICY_DENIED" and "evil.py" in problem.message
        assert not any(digest_of(b"{}") in path for path, _ in registry.asked), "its weights are not fetched"
    async with fetching(tmp_path / "b", policy=OCI | {"allow_remote_code": True}) as f:
        found = Path((await f.models.ensure_present(f"oci://{registry.host}/ai/tiny:1")).local_path)
        assert (found / "evil.py").read_bytes() == b"import os"


async def test_of_an_index_the_one_for_this_kind_of_machine_is_taken(registry: Registry, tmp_path: Path) -> None:
    mine = _MACHINES.get(platform.machine(), platform.machine())
    digests = {name: registry.put("x", (BODY + name.encode(), DOCKER_GGUF, None)) for name in ("s390x", mine)}
    for tags, theirs in (("both", ("s390x", mine)), ("other", ("s390x", "riscv64"))):
        listed = [
            {"digest": digests.get(one, digests["s390x"]), "platform": {"os": "linux", "architecture": one}} for one in theirs
        ]
        registry.manifests[tags] = json.dumps({"manifests": listed}).encode()
    path = await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:both")
    assert path.read_bytes() == BODY + mine.encode()
    async with fetching(tmp_path / "b", policy=OCI) as f:
        problem = await f.refusal(f"oci://{registry.host}/ai/tiny:other")
        assert "it stands for 2 artifacts, for linux/riscv64, linux/s390x" in problem.message


async def test_a_token_is_asked_for_read_only_and_shown_to_its_repository_alone(registry: Registry, tmp_path: Path) -> None:
    store = await Registry().start()
    try:
        registry.realm, registry.elsewhere = f"{registry.url}/token", store.url
        registry.put("1", (BODY, DOCKER_GGUF, None))
        store.blobs = registry.blobs
        await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:1")
        (wanted,) = [path for path, _ in registry.asked if path.startswith("/token")]
        assert "repository:ai/tiny:pull" in wanted and registry.tokens == 1
        assert [shown for path, shown in registry.asked if "/blobs/" in path] == ["Bearer token-1"]
        assert [shown for _, shown in store.asked] == [None]
    finally:
        await store.close()


async def test_a_token_that_runs_out_in_the_middle_is_renewed(registry: Registry, tmp_path: Path) -> None:
    registry.realm = f"{registry.url}/token"
    registry.put("1", (BODY, DOCKER_GGUF, None))
    async with fetching(tmp_path, policy=OCI) as f:
        await f.fetcher.look(parse_ref(f"oci://{registry.host}/ai/tiny:1"))
        registry.tokens += 1
        assert (await f.models.ensure_present(f"oci://{registry.host}/ai/tiny:1")).verified


async def test_a_login_opens_what_is_private_and_goes_to_the_registry_alone(registry: Registry, tmp_path: Path) -> None:
    registry.put("1", (BODY, DOCKER_GGUF, None))
    registry.realm, registry.login = f"{registry.url}/token", LOGIN
    ref = f"oci://{registry.host}/ai/tiny:1"
    async with fetching(tmp_path / "a", policy=OCI) as f:
        assert (await f.refusal(ref)).status == 403
    await fetched(tmp_path / "b", ref, logins=lambda host: LOGIN if host == registry.host else None)
    registry.realm, registry.asked = registry.url.replace("127.0.0.1", "localhost") + "/token", []
    async with fetching(tmp_path / "c", policy=OCI | {"allow_domains": ["127.0.0.1", "localhost"]}, logins=lambda _: LOGIN) as f:
        assert (await f.refusal(ref)).status == 403, "its token service is at another host, which does not see the login"
    assert LOGIN not in [shown for _, shown in registry.asked]


async def test_a_registry_that_asks_for_the_login_itself_gets_it(registry: Registry, tmp_path: Path) -> None:
    registry.put("1", (BODY, DOCKER_GGUF, None))
    registry.basic = LOGIN
    await fetched(tmp_path, f"oci://{registry.host}/ai/tiny:1", logins=lambda _: LOGIN)
    assert LOGIN in [shown for path, shown in registry.asked if "/blobs/" in path]


async def test_a_blob_that_is_another_one_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.put("1", (BODY, DOCKER_GGUF, None))
    registry.blobs[digest_of(BODY)] = BODY[:-1] + b"X"
    async with fetching(tmp_path, policy=OCI) as f:
        assert (await f.refusal(f"oci://{registry.host}/ai/tiny:1")).code == "DIGEST_MISMATCH"


@pytest.mark.parametrize(
    ("ref", "url"),
    [
        ("oci://docker.io/ai/smollm2:latest", "https://registry-1.docker.io/v2/ai/smollm2"),
        ("oci://docker.io/smollm2:latest", "https://registry-1.docker.io/v2/library/smollm2"),
        ("oci://ghcr.io/a/b/c:1", "https://ghcr.io/v2/a/b/c"),
        ("oci://127.0.0.1:5000/a:1", "http://127.0.0.1:5000/v2/a"),
        ("oci://10.0.0.1:5000/a:1", "https://10.0.0.1:5000/v2/a"),
    ],
)
def test_where_a_repository_is(ref: str, url: str) -> None:
    assert str(repository_of(parse_ref(ref), may_be_plain=True)) == url


def test_without_http_a_registry_on_this_machine_is_asked_over_tls_too() -> None:
    assert repository_of(parse_ref("oci://127.0.0.1:5000/a:1"), may_be_plain=False).scheme == "https"


@pytest.mark.parametrize(
    ("service", "registry", "same"),
    [
        ("auth.docker.io", "registry-1.docker.io", True), ("gitlab.com", "registry.gitlab.com", True),
        ("ghcr.io", "ghcr.io", True),
        ("evil.io", "ghcr.io", False), ("evildocker.io", "registry-1.docker.io", False), ("1.0.0.1", "10.0.0.1", False),
    ],
)  # fmt: skip
def test_whose_token_service_it_is(service: str, registry: str, *, same: bool) -> None:
    assert _is_of(service, registry) is same


def test_logins_are_those_of_other_tools(tmp_path: Path) -> None:
    auth = base64.b64encode(b"me:secret").decode()
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": auth}, "ghcr.io": {}, "odd": {"auth": "?"}}}))
    for env in ({"DOCKER_CONFIG": str(tmp_path)}, {"REGISTRY_AUTH_FILE": str(file)}):
        login = logins_of(env)
        assert login("registry-1.docker.io") == f"Basic {auth}"
        assert login("ghcr.io") is None and login("odd") is None and login("quay.io") is None
    file.write_text("not json")
    assert logins_of({"REGISTRY_AUTH_FILE": str(file)})("registry-1.docker.io") is None and logins_of({})("ghcr.io") is None


async def test_oci_is_for_policy_to_allow(registry: Registry, tmp_path: Path) -> None:
    async with fetching(tmp_path, policy={"allow_schemes": ["https"]}) as f:
        error: PoolError = await f.refusal(f"oci://{registry.host}/ai/tiny:1")
        assert error.code == "POLICY_DENIED" and registry.asked == []


@pytest.mark.parametrize(
    ("path", "kept"),
    [("m.gguf", "m.gguf"), ("/etc/passwd", "etc/passwd"), ("../../a/b", "a/b"), ("a/../../b", "b"), ("./a//b/", "a/b"),
     ("..", ""), ("/", ""), ("", ""), ("/../a", "a")],
)  # fmt: skip
def test_no_path_of_a_layer_leads_out(path: str, kept: str) -> None:
    assert confined(path) == kept


def test_of_what_oras_pushes_a_folder_is_an_archive_and_a_file_is_none() -> None:
    kind, named = "application/vnd.oci.image.layer.v1.tar", {"org.opencontainers.image.title": "tiny"}
    told = {"digest": digest_of(b""), "size": 0}
    file = _layer({**told, "mediaType": kind, "annotations": named}, MODEL)
    folder = _layer({**told, "mediaType": f"{kind}+gzip", "annotations": named | {"io.deis.oras.content.unpack": "true"}}, MODEL)
    layer = _layer({**told, "mediaType": kind}, MODEL)
    assert [(one.is_packed, one.is_of_image) for one in (file, folder, layer)] == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("application/vnd.docker.ai.vllm.config.tar", True), ("application/vnd.docker.ai.dir.tar", True),
        ("application/vnd.cncf.model.weight.v1.tar+gzip", True), ("application/vnd.docker.image.rootfs.diff.tar.gzip", True),
        ("application/vnd.cncf.model.weight.v1.tar; charset=utf-8", True), ("application/vnd.cncf.model.weight.v1.raw", False),
        ("application/vnd.docker.ai.safetensors", False), ("", False), (None, False), (7, False),
    ],
)  # fmt: skip
def test_what_is_an_archive_says_its_media_type(kind: Any, *, packed: bool) -> None:
    assert _layer({"digest": digest_of(b""), "size": 0, "mediaType": kind}, MODEL).is_packed is packed
