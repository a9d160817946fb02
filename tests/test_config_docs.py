"""The schema and the reference page in docs/ are those of the code."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from pool_managerd.config import Config
from pool_managerd.config_docs import reference_text
from pool_managerd.config_load import config_schema_text

REFERENCE = Path(__file__).resolve().parent.parent / "docs/reference"


def test_the_schema_in_docs_is_current() -> None:
    text = (REFERENCE / "config.schema.json").read_text("utf-8")
    assert text == config_schema_text(), "run: pool-managerd config schema > docs/reference/config.schema.json"


def test_the_reference_page_is_current() -> None:
    text = (REFERENCE / "config.md").read_text("utf-8")
    assert text == reference_text(), "run: python -m pool_managerd.config_docs > docs/reference/config.md"


def test_the_schema_is_a_valid_one_and_closed() -> None:
    schema = json.loads(config_schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "$id" not in schema
    assert "base_dir" not in schema["properties"]
    assert schema["additionalProperties"] is False


def test_the_schema_accepts_a_configuration_and_refuses_a_misspelt_one() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(config_schema_text()))
    good = {
        "profile": "dev",
        "pools": [{"id": "a", "engine": "llamacpp", "model": "file:m", "provisioning": {"mode": "package"}}],
    }
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "profil": "dev"})


def test_every_section_and_key_is_on_the_page() -> None:
    text = reference_text()
    dumped = Config().model_dump(mode="json")
    for section, values in dumped.items():
        assert f"`{section}`" in text
        for key in values if isinstance(values, dict) else ():
            assert f"| `{key}` |" in text
