"""Ollama's models, by their manifests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pool_managerd.errors import SpecError
from pool_managerd.models.ollama import ollama_model, ollama_refs
from pool_managerd.models.refs import parse_ref
from tests.models.other_tools import ollama, sha256

BODY = b"GGUF\x03\x00\x00\x00 of Ollama"


@pytest.mark.parametrize(
    ("text", "ref", "manifest"),
    [
        ("ollama:tiny", "ollama:tiny:latest", "registry.ollama.ai/library/tiny"),
        ("Ollama:library/tiny:latest", "ollama:tiny:latest", "registry.ollama.ai/library/tiny"),
        ("ollama:registry.ollama.ai/library/tiny", "ollama:tiny:latest", "registry.ollama.ai/library/tiny"),
        ("ollama:ann/tiny:1b-q4_K_M", "ollama:ann/tiny:1b-q4_K_M", "registry.ollama.ai/ann/tiny"),
        ("ollama:hf.co/org/Repo-GGUF:Q4_K_M", "ollama:hf.co/org/Repo-GGUF:Q4_K_M", "hf.co/org/Repo-GGUF"),
        ("ollama:reg.example:5000/ann/tiny:x", "ollama:reg.example:5000/ann/tiny:x", "reg.example:5000/ann/tiny"),
    ],
)
def test_one_model_has_one_reference(text: str, ref: str, manifest: str) -> None:
    model = parse_ref(text)
    assert (model.scheme, model.id, model.location) == ("ollama", ref, manifest)


@pytest.mark.parametrize(
    "text", ["ollama:", "ollama:../etc", "ollama:a/../../b", "ollama:a:b:c", "ollama:a/b/c/d", "ollama:/x", "ollama:a:.."]
)
def test_a_name_that_leads_anywhere_else_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="cannot use"):
        parse_ref(text)


def test_a_model_is_the_blob_that_its_manifest_names(tmp_path: Path) -> None:
    ollama(tmp_path, BODY, "registry.ollama.ai/library/tiny/latest", ("template", b"{{ .Prompt }}"), ("projector", b"GGUF eyes"))
    found = ollama_model(tmp_path, parse_ref("ollama:tiny"))
    assert found is not None
    assert found.file.place == tmp_path / f"blobs/sha256-{sha256(BODY)}" and found.file.sha256 == sha256(BODY)
    assert found.notices == ("its projector, which reads images, is not used",)
    assert ollama_model(tmp_path, parse_ref("ollama:tiny:other")) is None
    ollama(tmp_path, BODY, "hf.co/org/Repo-GGUF/Q4_K_M")
    (tmp_path / "manifests/registry.ollama.ai/library/tiny/.DS_Store").touch()
    assert list(ollama_refs(tmp_path)) == ["ollama:hf.co/org/Repo-GGUF:Q4_K_M", "ollama:tiny:latest"]


def refusal(root: Path) -> str:
    with pytest.raises(SpecError) as caught:
        ollama_model(root, parse_ref("ollama:tiny"))
    return caught.value.message


def test_what_is_not_one_whole_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    name = "registry.ollama.ai/library/tiny/latest"
    ollama(tmp_path, BODY, name, ("adapter", b"GGUF lora"))
    assert "it has an adapter" in refusal(tmp_path)
    ollama(tmp_path, BODY, name, ("model", b"GGUF more"))
    assert "it is in parts" in refusal(tmp_path)
    manifest = tmp_path / "manifests" / name
    manifest.write_text(json.dumps({"layers": []}))
    assert "no model of its own" in refusal(tmp_path)
    ollama(tmp_path, BODY, name)
    (tmp_path / f"blobs/sha256-{sha256(BODY)}").rename(tmp_path / f"blobs/sha256-{sha256(BODY)}-partial")
    assert "is not there" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}', "[" * 9_999],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    ollama(tmp_path, BODY)
    (tmp_path / "manifests/registry.ollama.ai/library/tiny/latest").write_text(text)
    assert "is no manifest of Ollama" in refusal(tmp_path)


def test_a_pipe_in_a_manifests_place_is_not_waited_for(tmp_path: Path) -> None:
    manifest = tmp_path / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    os.mkfifo(manifest)
    assert "cannot be read" in refusal(tmp_path)
