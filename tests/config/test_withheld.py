"""A configuration's text is kept without its secrets, and comes back with those of now."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.config.load import load_text
from pool_managerd.config.withheld import restored, secrets_of, taken_out
from pool_managerd.errors import SpecError

FILE = Path("/etc/pm/pm.yaml")
TEXT = """# kept: the token is s3cr3t-token
x-env: &env {HF_TOKEN: s3cr3t-token, OMP_NUM_THREADS: "4"}
pools:
  - {id: a, engine: llamacpp, model: "file:m.gguf", provisioning: {env: *env, flags: [--api-key, "k3y-of-the-api"]}}
  - id: b
    engine: llamacpp
    model: "file:/srv/models/m.gguf"
    provisioning:
      mode: external
      url: http://user:pa55w0rd@127.0.0.1:8000
      env: {MODELS: /srv/models, SHORT: abc}
"""
SECRETS = ("s3cr3t-token", "k3y-of-the-api", "pa55w0rd")


def kept(text: str = TEXT, path: Path = FILE) -> tuple[str, dict[str, str]]:
    found = taken_out(text, load_text(text, path, env={}), path)
    assert found is not None
    return found


def known(text: str, path: Path = FILE) -> dict[str, str]:
    return {word: value for word, (_, value) in secrets_of(load_text(text, path, env={})).items()}


def test_no_secret_is_in_what_is_kept_and_it_comes_back_as_it_was() -> None:
    text, called = kept()
    assert not any(secret in text for secret in SECRETS) and "# kept: the token is withheld-" in text
    assert set(called.values()) >= {"HF_TOKEN of pool a", "--api-key of pool a"}
    assert restored(text, called, known(TEXT), FILE) == TEXT


def test_what_stands_in_other_keys_as_well_is_no_secret() -> None:
    text, _ = kept()
    assert "file:/srv/models/m.gguf" in text and "MODELS: /srv/models" in text and "SHORT: abc" in text


def test_a_secret_that_was_changed_since_is_the_present_one() -> None:
    text, called = kept()
    rotated = TEXT.replace("s3cr3t-token", "another-token")
    assert restored(text, called, known(rotated), FILE) == rotated


def test_a_secret_that_is_gone_is_named() -> None:
    text, called = kept()
    without = TEXT.replace('[--api-key, "k3y-of-the-api"]', "[]")
    with pytest.raises(SpecError, match="not in the file any more: --api-key of pool a"):
        restored(text, called, known(without), FILE)


def test_a_secret_that_would_be_read_as_something_else_is_not_put_there() -> None:
    text, called = kept()
    rotated = known(TEXT) | dict.fromkeys(word for word, name in called.items() if "HF_TOKEN" in name) | {}
    sneaky = {word: value or "x, PATH: /tmp" for word, value in rotated.items()}
    with pytest.raises(SpecError, match="written in another way"):
        restored(text, called, sneaky, FILE)


@pytest.mark.parametrize("written", ['"s3cr3t\\u002dtoken"', '"s3cr3t\\x2dtoken"'], ids=["unicode", "hex"])
def test_one_that_is_written_with_escapes_is_not_kept_at_all(written: str) -> None:
    text = TEXT.replace("HF_TOKEN: s3cr3t-token", f"HF_TOKEN: {written}")
    assert taken_out(text, load_text(text, FILE, env={}), FILE) is None


def test_a_text_without_secrets_is_kept_as_it_is_and_words_of_ours_in_it_are_not_believed() -> None:
    plain = "pools:\n  - {id: a, engine: llamacpp, model: 'file:m.gguf'} # nothing\n"
    assert kept(plain) == (plain, {})
    forged = plain.replace("nothing", "withheld-0123456789abcdef")
    assert taken_out(forged, load_text(forged, FILE, env={}), FILE) is None


def test_toml_as_well() -> None:
    path = FILE.with_suffix(".toml")
    text = '[[pools]]\nid = "a"\nengine = "llamacpp"\nmodel = "file:m.gguf"\nprovisioning.env = {HF_TOKEN = "s3cr3t-token"}\n'
    found, called = kept(text, path)
    assert "s3cr3t" not in found and restored(found, called, known(text, path), path) == text
