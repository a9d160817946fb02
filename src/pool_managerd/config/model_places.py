"""Where models of other tools may be used: their names, or directories laid out as theirs."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

TOOLS = ("huggingface", "lm-studio", "llama.cpp", "ollama")
"""Tools whose directories are known."""


def _place(value: str) -> str:
    if value in TOOLS or value.startswith(("/", "~/")):
        return value
    raise ValueError(f"must be {', '.join(TOOLS)}, or the absolute path of a directory that is laid out as one of theirs")


ModelPlace = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(_place)]
ModelPlaces = Annotated[tuple[ModelPlace, ...], Field(max_length=64)]
