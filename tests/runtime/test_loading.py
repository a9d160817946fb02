"""What the loader would not find is told before the start; no file makes the reading long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime.launcher import LaunchOptions
from pool_managerd.runtime.loading import loader_obstacle, loads_of
from pool_managerd.runtime.reach import UNPRIVILEGED
from tests.runtime.support import Bench


def build(root: Path, *options: str) -> tuple[Path, Path]:
    """A program and the folder of the library that it needs."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    libraries = root / "closed" / "lib"
    libraries.mkdir(parents=True)
    (root / "lib.c").write_text("int answer(void) { return 42; }\n")
    (root / "main.c").write_text("int answer(void);\nint main(void) { return answer() - 42; }\n")
    library, program = libraries / "libanswer.so", root / "engine"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, root / "lib.c"], check=True)
    subprocess.run(["cc", "-o", program, root / "main.c", f"-L{libraries}", "-lanswer", *options], check=True)
    program.chmod(0o755)
    return program, libraries


@pytest.mark.parametrize("tag", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_library_in_a_closed_folder_is_named_and_one_in_an_open_one_is_found(root: Path, tag: str) -> None:
    program, libraries = build(root, f"-Wl,{tag},-rpath,$ORIGIN/closed/lib")
    assert loader_obstacle(str(program), UNPRIVILEGED, "") is None
    libraries.parent.chmod(0o700)
    obstacle = loader_obstacle(str(program), UNPRIVILEGED, "")
    assert obstacle is not None
    assert (obstacle.path, obstacle.wanted) == (str(root / "closed"), str(libraries / "libanswer.so"))
    libraries.parent.chmod(0o755)
    (libraries / "libanswer.so").chmod(0o600)
    assert "may not be read" in str(loader_obstacle(str(program), UNPRIVILEGED, ""))


def test_the_folders_of_the_environment_count(root: Path) -> None:
    program, libraries = build(root)
    assert loader_obstacle(str(program), UNPRIVILEGED, "") is None, "what is found nowhere may be in the loader's own settings"
    libraries.parent.chmod(0o700)
    assert loader_obstacle(str(program), UNPRIVILEGED, str(libraries)) is not None
    copy = root / "open"
    copy.mkdir()
    shutil.copy(libraries / "libanswer.so", copy)
    assert loader_obstacle(str(program), UNPRIVILEGED, f"{libraries}:{copy}") is None


@pytest.mark.usefixtures("as_root")
async def test_an_engine_whose_library_is_out_of_reach_is_not_started(bench: Bench, root: Path) -> None:
    program, libraries = build(root, "-Wl,-rpath,$ORIGIN/closed/lib")
    assert (await bench.run(PreparedEngine("p", str(program)))).code == 0
    libraries.parent.chmod(0o700)
    script = root / "script"
    script.write_text(f"#!{program}\n")
    script.chmod(0o755)
    for binary in (program, script):
        with pytest.raises(EngineError, match="closed may not be entered") as caught:
            await bench.launch(PreparedEngine("p", str(binary)), options=LaunchOptions(profile="home"))
        assert "libanswer.so" in caught.value.message


def test_the_interpreter_of_these_tests_can_be_loaded() -> None:
    found = loads_of(str(Path(sys.executable).resolve()))
    assert found is not None
    assert found.interpreter
    assert any(name.startswith("libc.") for name in found.needed)


@example(b"\x7fELF")
@example(b"\x7fELF\x02")
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reading_fail(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    for head in (b"", b"\x7fELF\x02\x01\x01" + bytes(9), b"\x7fELF\x01\x02\x01" + bytes(9)):
        path.write_bytes(head + tail)
        loads_of(str(path))
