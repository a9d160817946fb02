"""Writes the generated reference pages beside this file: `python docs/reference/regenerate.py`. A test compares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pool_managerd.api import openapi
from pool_managerd.cli import reference
from pool_managerd.config.load import config_schema_text
from pool_managerd.config.reference import reference_text
from pool_managerd.telemetry import series

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from crash_page import crash_page  # noqa: E402 - it lies beside this file
from library_page import library  # noqa: E402 - it lies beside this file


def pages() -> dict[str, str]:
    """File name and text of every page that is generated from the code here."""
    return {
        "api.md": openapi.markdown(),
        "openapi.json": json.dumps(openapi.document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n",
        "cli.md": reference.markdown(),
        "config.md": reference_text(),
        "config.schema.json": config_schema_text(),
        "crashes.md": crash_page(),
        "library.md": library(),
        "metrics.md": series.markdown(),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
