"""The schema and the reference page in docs/ are those of the code."""

from __future__ import annotations

import json

import jsonschema

from pool_managerd.config import Config
from pool_managerd.config_docs import reference_text
from pool_managerd.config_load import config_schema_text


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
