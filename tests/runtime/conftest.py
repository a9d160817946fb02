from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pool_managerd.runtime.spawner import Spawner
from tests.runtime.support import Bench


@pytest.fixture
def root() -> Iterator[Path]:
    """A runtime directory that every user can reach; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="pm-runtime-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def bench(root: Path, engines_run: None) -> AsyncIterator[Bench]:
    bench = Bench(root, Spawner())
    yield bench
    await bench.close()
    assert bench.spawner.pid is None


@pytest.fixture
def full_disk(root: Path) -> Iterator[Callable[[], None]]:
    """Puts a small disk below the runtime directory; calling the value fills it to the last byte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0755", "none", root], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")

    def fill() -> None:
        with suppress(OSError), (root / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    yield fill
    subprocess.run(["umount", root], check=True)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can change users")
