"""What is built to be installed elsewhere has all that it needs there."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.conftest import REPOSITORY


def test_the_wheel_and_the_source_distribution_are_whole(tmp_path: Path) -> None:
    """Every file of the package, the simulated driver's sources among them, and what the two commands need."""
    argv = [sys.executable, "-m", "hatchling", "build", "--directory", str(tmp_path)]
    built = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    package = {
        str(path.relative_to(REPOSITORY / "src"))
        for path in (REPOSITORY / "src/pool_managerd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert package - names == set() and b"pool-managerd = pool_managerd.cli.main:run" in wheel.read(entry)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as source:
        inside = {name.partition("/")[2] for name in source.getnames()}
    assert {f"src/{name}" for name in package} - inside == set()
    assert {
        "Makefile",
        "requirements/check.sh",
        "requirements/dev.txt",
        "README.md",
        "docs/index.md",
        "mkdocs.yml",
    } - inside == set()
