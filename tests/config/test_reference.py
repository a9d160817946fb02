"""The schema and the reference page in docs/ are those of the code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema

from pool_managerd.config import Config
from pool_managerd.config.load import config_schema_text
from pool_managerd.config.reference import reference_text


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


def _keys(node: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every key with its path and schema, and whether it is a section."""
    for name, value in node["properties"].items():
        refs = [part["$ref"] for part in [value, *value.get("anyOf", []), value.get("items", {})] if "$ref" in part]
        yield f"{prefix}{name}", value, "$ref" in value
        for ref in refs:
            inner = schema["$defs"][ref.rpartition("/")[2]]
            if "properties" in inner:
                yield from _keys(inner, schema, f"{prefix}{name}.")


def test_every_key_has_a_meaning_and_an_example() -> None:
    schema = json.loads(config_schema_text())
    for path, value, is_section in _keys(schema, schema):
        if is_section:
            inner = schema["$defs"][value["$ref"].rpartition("/")[2]]
            assert inner.get("description"), f"{path}: its section says nothing"
            continue
        assert len(value.get("description", "")) > 10, f"{path} has no meaning"
        assert value.get("examples") or value.get("default") not in (None, [], {}), path


def test_the_examples_are_accepted() -> None:
    validator = jsonschema.Draft202012Validator(schema := json.loads(config_schema_text()))
    for path, value, _ in _keys(schema, schema):
        for example in value.get("examples", []):
            errors = [e.message for e in validator.evolve(schema={**value, "$defs": schema["$defs"]}).iter_errors(example)]
            assert errors == [] or "…" in str(example), f"{path}: {errors}"
