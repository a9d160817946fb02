"""Models on local disk: found, checked, verified; everything else refused with the remedy."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.models.provisioner import ModelProvisioner
from tests.models.test_gguf_header import write_split

CONTENT = b"GGUF\x03\x00\x00\x00rest"
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
WRONG = "sha256:" + "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.gguf").write_bytes(CONTENT)
    return tmp_path


def provisioner(folder: Path, **policy: object) -> ModelProvisioner:
    return ModelProvisioner(folder, PolicyConfig.model_validate(policy))


async def refusal(folder: Path, ref: str, digest: str | None = None, **policy: object) -> PoolError:
    with pytest.raises(PoolError) as caught:
        await provisioner(folder, **policy).ensure_present(ref, digest)
    return caught.value


async def test_a_local_file_is_resolved_against_the_base_directory(folder: Path) -> None:
    model = await provisioner(folder).ensure_present("file:models/tiny.gguf")
    assert model.local_path == str(folder / "models/tiny.gguf")
    assert (model.id, model.size_bytes, model.digest, model.verified) == ("file:models/tiny.gguf", len(CONTENT), None, False)
    assert (await provisioner(folder).ensure_present_str(f"{folder}/models/tiny.gguf")).local_path == model.local_path


async def test_the_home_of_an_unknown_user_is_a_name_like_any_other(folder: Path) -> None:
    assert "there is no such file" in (await refusal(folder, "file:~no-such-user/m.gguf")).message


async def test_a_matching_digest_verifies_whatever_its_case(folder: Path) -> None:
    model = await provisioner(folder).ensure_present("file:models/tiny.gguf", DIGEST.upper().replace("SHA256", "sha256"))
    assert (model.digest, model.verified) == (DIGEST, True)


async def test_another_digest_is_refused_naming_both(folder: Path) -> None:
    error = await refusal(folder, "file:models/tiny.gguf", WRONG)
    assert (error.code, error.status) == ("DIGEST_MISMATCH", 422)
    assert "digest mismatch" in error.message
    assert WRONG in error.message
    assert DIGEST in error.message


async def test_a_second_verification_reads_nothing(folder: Path) -> None:
    models, seen = provisioner(folder), []
    await models.ensure_present("file:models/tiny.gguf", DIGEST)
    again = await models.ensure_present("file:models/tiny.gguf", DIGEST, progress=lambda done, total: seen.append(done))
    assert again.verified
    assert seen == []


async def test_what_takes_the_files_place_while_it_is_hashed_is_hashed_too(folder: Path) -> None:
    path, replaced = folder / "models/tiny.gguf", [0]

    def replace(done: int, total: int) -> None:
        if replaced[0] < most:
            replaced[0] += 1
            (folder / "new").write_bytes(CONTENT + b"changed")
            (folder / "new").rename(path)

    most = 1
    with pytest.raises(SpecError, match="digest mismatch"):
        await provisioner(folder).ensure_present("file:models/tiny.gguf", DIGEST, progress=replace)
    path.write_bytes(CONTENT)
    most = 1_000
    with pytest.raises(NodeError, match="replaced again and again"):
        await provisioner(folder).ensure_present("file:models/tiny.gguf", DIGEST, progress=replace)


async def test_a_missing_file_names_its_full_path_and_what_is_beside_it(folder: Path) -> None:
    error = await refusal(folder, "file:models/tinny.gguf")
    assert error.message == f"cannot use the model {folder}/models/tinny.gguf: there is no such file"
    assert error.hint == f"file:models/tinny.gguf means {folder}/models/tinny.gguf; beside it: tiny.gguf"
    deep = await refusal(folder, "file:no/such/m.gguf")
    assert deep.hint is not None
    assert f"only {folder} exists" in deep.hint


async def test_a_folder_is_a_model_until_a_digest_is_asked_for(folder: Path) -> None:
    model = await provisioner(folder).ensure_present("file:models")
    assert model.local_path == str(folder / "models")
    assert "a digest belongs to a file" in (await refusal(folder, "file:models", DIGEST)).message
    with pytest.raises(SpecError, match="a digest belongs to a file"):  # preflight says so, too
        provisioner(folder).check("file:models", [DIGEST])


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".PT"])
async def test_pickles_are_refused_with_the_reason(folder: Path, suffix: str) -> None:
    (folder / f"m{suffix}").write_bytes(b"x")
    assert "run code of their author's choice" in (await refusal(folder, f"file:m{suffix}")).message


async def test_an_empty_file_a_pipe_and_a_file_that_is_no_gguf_are_refused(folder: Path) -> None:
    (folder / "empty.gguf").touch()
    (folder / "page.gguf").write_bytes(b"<html>")
    os.mkfifo(folder / "pipe")
    assert "the file is empty" in (await refusal(folder, "file:empty.gguf")).message
    assert "an error page saved as a model" in (await refusal(folder, "file:page.gguf")).message
    assert "neither a file nor a directory" in (await refusal(folder, "file:pipe")).message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_an_unreadable_file_is_refused(folder: Path) -> None:
    (folder / "models/tiny.gguf").chmod(0)
    assert "not readable" in (await refusal(folder, "file:models/tiny.gguf")).message


@pytest.mark.parametrize("ref", ["hf:org/repo/m.gguf", "https://example.org/m", "s3://b/k", "oci://r/x:1"])
async def test_policy_denies_a_scheme_before_anything_else(folder: Path, ref: str) -> None:
    scheme = ref.partition(":")[0]
    denied = await refusal(folder, ref)
    assert (denied.code, denied.status) == ("POLICY_DENIED", 403)
    assert f"{scheme!r} is not allowed (allowed: file)" in denied.message
    assert f"add {scheme} to policy.allow_schemes" in (denied.hint or "")


@pytest.mark.parametrize("ref", ["hf:org/repo/m.gguf", "https://example.org/m"])
async def test_policy_denies_the_network_and_without_a_fetcher_nothing_is_fetched(folder: Path, ref: str) -> None:
    schemes = ("file", ref.partition(":")[0])
    offline = await refusal(folder, ref, allow_schemes=schemes)
    assert offline.code == "POLICY_DENIED" and "the network may not be used" in offline.message
    absent = await refusal(folder, ref, allow_schemes=schemes, allow_network=True)
    assert isinstance(absent, NodeError) and absent.code == "MODEL_NOT_FETCHED"
    assert f"models pull {ref}" in (absent.hint or "")


async def test_what_this_version_cannot_fetch_is_said(folder: Path) -> None:
    ref = "sha256:" + "0" * 64
    unsupported = await refusal(folder, ref, allow_network=True)
    assert isinstance(unsupported, NodeError) and not unsupported.retriable
    assert unsupported.message == f"cannot fetch {ref}: this version fetches hf, https, http, oci, s3 models"


async def test_files_can_be_denied_too(folder: Path) -> None:
    assert (await refusal(folder, "file:models/tiny.gguf", allow_schemes=("hf",))).code == "POLICY_DENIED"


@pytest.mark.parametrize("digest", ["", "sha256:12", "md5:abc", "0" * 64])
async def test_a_malformed_digest_is_an_error_not_a_mismatch(folder: Path, digest: str) -> None:
    error = await refusal(folder, "file:models/tiny.gguf", digest)
    assert isinstance(error, SpecError)
    assert "as a digest" in error.message


def digest_of(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


async def test_a_split_model_is_verified_part_by_part(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_split(tmp_path, tiny_model)
    ref, digests, seen = f"file:{paths[0]}", [digest_of(path) for path in paths], []
    whole = sum(path.stat().st_size for path in paths)
    model = await provisioner(tmp_path).ensure_present(ref, digests, progress=lambda done, total: seen.append((done, total)))
    assert (model.verified, model.size_bytes, model.files) == (True, whole, tuple(map(str, paths)))
    assert seen[-1] == (whole, whole)
    data = bytearray(paths[2].read_bytes())
    data[-1] ^= 1
    paths[2].write_bytes(data)
    error = await refusal(tmp_path, ref, digests)  # type: ignore[arg-type]
    assert error.code == "DIGEST_MISMATCH" and paths[2].name in error.message


async def test_a_part_that_is_replaced_while_a_later_one_is_hashed_is_noticed(tmp_path: Path, tiny_model: Path) -> None:
    first, second = write_split(tmp_path, tiny_model, 2)
    digests = [digest_of(part) for part in (first, second)]

    def replace(done: int, total: int) -> None:
        if done > first.stat().st_size:
            (tmp_path / "new").write_bytes(first.read_bytes()[:-1] + b"!")
            (tmp_path / "new").rename(first)

    with pytest.raises(SpecError, match="digest mismatch"):
        await provisioner(tmp_path).ensure_present(f"file:{first}", digests, progress=replace)


async def test_one_checksum_never_stands_for_all_parts_of_a_split_model(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_split(tmp_path, tiny_model)
    error = await refusal(tmp_path, f"file:{paths[0]}", digest_of(paths[0]))
    assert "split into 3 parts, and provisioning.model.checksum has 1 digest" in error.message
    assert error.hint == "list one per part, in their order: sha256sum big-*-of-00003.gguf"


async def test_every_part_of_a_split_model_must_be_there_and_be_usable(tmp_path: Path, tiny_model: Path) -> None:
    paths = write_split(tmp_path, tiny_model)
    assert "not the first of 3 parts" in (await refusal(tmp_path, f"file:{paths[1]}")).message
    paths[1].write_bytes(b"")
    assert f"{paths[1]}: the file is empty" in (await refusal(tmp_path, f"file:{paths[0]}")).message
    paths[1].unlink()
    assert "1 of its 3 parts are missing" in (await refusal(tmp_path, f"file:{paths[0]}")).message


async def test_what_a_file_begins_with_decides_what_it_is_and_not_its_name(folder: Path) -> None:
    for name in ("sha256-" + "a" * 64, "model.bin", "b" * 64):
        (folder / name).write_bytes(CONTENT)
        assert (await provisioner(folder).ensure_present(f"file:{name}")).size_bytes == len(CONTENT)
    (folder / ("c" * 64)).write_bytes(b"PK\x03\x04archive/data.pkl")
    assert "pickles" in (await refusal(folder, "file:" + "c" * 64)).message


async def test_the_real_model_has_its_published_digest(smol_model: Path) -> None:
    published = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    model = await ModelProvisioner(smol_model.parent, PolicyConfig()).ensure_present(f"file:{smol_model.name}", published)
    assert (model.verified, model.size_bytes) == (True, 98_362_432)
