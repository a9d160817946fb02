"""Whether a file is a GGUF model at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pool_managerd.errors import SpecError
from pool_managerd.models.gguf import check_gguf


def test_a_real_model_passes(tiny_model: Path) -> None:
    assert check_gguf(str(tiny_model)) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "instead of b'GGUF': the file is empty"),
        (b"\0" * 100, "not filled yet"),
        (b"GGUF", "instead of"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "an error page"),
        (b'{"error": 1}', "JSON file"),
        (b"PK\x03\x04....", "PyTorch checkpoint"),
        (b"\x80\x02}q\x00X\x01\x00", "PyTorch checkpoint"),
        (b"GGUF" + struct.pack("<I", 1), "format version 1 is not"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
    ],
)
def test_what_is_no_gguf_is_refused_with_a_guess(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=reason) as caught:
        check_gguf(str(path))
    assert caught.value.message.startswith(f"cannot use {path} as a GGUF model: ")


def test_a_missing_file_a_folder_and_a_pipe_are_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", ".", "pipe"):
        with pytest.raises(SpecError, match="as a GGUF model"):
            check_gguf(str(tmp_path / name))
