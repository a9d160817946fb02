"""Every scheme of a model reference, and what is wrong with the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.errors import SpecError
from pool_managerd.models.refs import parse_ref

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "scheme", "ref_id", "location", "file"),
    [
        ("file:/models/a.gguf", "file", "file:/models/a.gguf", "/models/a.gguf", ""),
        ("file:///models/a.gguf", "file", "file:/models/a.gguf", "/models/a.gguf", ""),
        ("  file:models//./a.gguf/ ", "file", "file:models/a.gguf", "models/a.gguf", ""),
        ("file:../a.gguf", "file", "file:../a.gguf", "../a.gguf", ""),
        ("models/a.gguf", "file", "file:models/a.gguf", "models/a.gguf", ""),
        ("./a.gguf", "file", "file:a.gguf", "a.gguf", ""),
        ("C:odd.gguf", "file", "file:C:odd.gguf", "C:odd.gguf", ""),
        ("hf:org/repo", "hf", "hf:org/repo", "org/repo", ""),
        ("hf:org/repo/", "hf", "hf:org/repo", "org/repo", ""),
        ("hf:org/repo/sub/a.gguf", "hf", "hf:org/repo/sub/a.gguf", "org/repo", "sub/a.gguf"),
        ("hf:org/repo@v1.0/a.gguf", "hf", "hf:org/repo@v1.0/a.gguf", "org/repo", "a.gguf"),
        ("hf:org/repo:q4_k_m", "hf", "hf:org/repo:Q4_K_M", "org/repo", ""),
        ("hf:org/repo@main:Q8_0/", "hf", "hf:org/repo@main:Q8_0", "org/repo", ""),
        ("https://example.org/a.gguf", "https", "https://example.org/a.gguf", "https://example.org/a.gguf", ""),
        ("HTTP://example.org:81/a/", "http", "http://example.org:81/a", "http://example.org:81/a", ""),
        ("s3://bucket/some/key", "s3", "s3://bucket/some/key", "s3://bucket/some/key", ""),
        ("oci://registry:5000/a/b:v1", "oci", "oci://registry:5000/a/b:v1", "oci://registry:5000/a/b:v1", ""),
        (f"oci://nvcr.io/x@sha256:{HEX}", "oci", f"oci://nvcr.io/x@sha256:{HEX}", f"oci://nvcr.io/x@sha256:{HEX}", ""),
        (f"sha256:{HEX.upper()}", "sha256", f"sha256:{HEX}", HEX, ""),
    ],
)
def test_a_reference_has_a_scheme_a_stable_id_and_a_place(text: str, scheme: str, ref_id: str, location: str, file: str) -> None:
    ref = parse_ref(text)
    assert (ref.scheme, ref.id, ref.location, ref.file) == (scheme, ref_id, location, file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("   ", "it is empty"),
        ("file:", "the path is missing"),
        ("file://host/a", "a host is not supported"),
        ("hf:org", "it must be hf:ORG/REPO"),
        ("hf:", "it must be hf:ORG/REPO"),
        ("hf:org/../etc", "it must be hf:ORG/REPO"),
        ("hf:org/repo@/a.gguf", "it must be hf:ORG/REPO"),
        ("hf:org/repo@../a.gguf", "it must be hf:ORG/REPO"),
        ("hf:org/repo:Q8_0/a.gguf", "both a quantisation and a file"),
        ("hf:org/repo/../../etc/passwd", "a plain path inside the repository"),
        ("sha256:12", "64 hexadecimal digits"),
        ("s3://bucket", "s3://BUCKET/KEY"),
        ("oci://registry/Repo:x", "oci://REGISTRY/REPO:TAG"),
        ("https://", "the host is missing"),
        ("https://example.org:99999/x", "[Pp]ort"),
        ("ftp://example.org/x", "the scheme 'ftp' is unknown"),
        ("a\0b", "control characters"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_malformed_reference_says_why(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as caught:
        parse_ref(text)
    assert caught.value.status == 400
    assert caught.value.hint is not None
    assert len(caught.value.message) < 300


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError, match="credentials") as caught:
        parse_ref("https://user:hunter2@example.org/a.gguf")
    assert "hunter2" not in caught.value.message


@given(
    st.from_regex(r"[a-zA-Z0-9._/-]{1,60}", fullmatch=True), st.sampled_from(["file:", "hf:o/r/", "https://h/", "s3://b/", ""])
)
def test_the_id_of_a_reference_is_a_reference_with_the_same_id(path: str, prefix: str) -> None:
    try:
        ref = parse_ref(prefix + path)
    except SpecError:
        return
    assert parse_ref(ref.id).id == ref.id
    assert parse_ref(f"  {ref.id}  ") == parse_ref(ref.id)


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_a_spec_error(text: str) -> None:
    try:
        assert parse_ref(text).id
    except SpecError as error:
        assert error.message.startswith("cannot use")


def test_what_is_behind_the_path_of_an_address_is_told_to_nobody() -> None:
    """It may be a signature that gives access; two of them are two models all the same."""
    one, other = parse_ref("https://h/m.gguf?X-Amz-Signature=SECRET&token=t"), parse_ref("https://h/m.gguf?id=2")
    assert "SECRET" not in one.id and "SECRET" in one.location and one.id != other.id
    assert parse_ref(one.id).id == one.id and one.id.startswith("https://h/m.gguf?sha256-")


@pytest.mark.parametrize(
    ("typed", "model_id"),
    [
        ("hf://org/repo/m.gguf", "hf:org/repo/m.gguf"), ("ollama://llama3", "ollama:llama3:latest"),
        ("oci://ghcr.io/org/m", "oci://ghcr.io/org/m:latest"),
    ],
)  # fmt: skip
def test_spellings_that_people_type_mean_what_they_mean(typed: str, model_id: str) -> None:
    assert parse_ref(typed).id == model_id
