"""A simulated NVIDIA driver: built from source, driven by a topology file that may change while it runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pool_managerd.errors import NodeError, SpecError
from pool_managerd.host.simulated_topology import MAX_FILE_BYTES, first_mistake

TOPOLOGY_VARIABLE = "POOL_MANAGERD_SIMULATED_GPUS"
_LIBRARY = "libnvidia-ml.so.1"
_SOURCES = ("simulated_topology.h", "simulated_topology.c", "simulated_nvml.c")
_FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 60


def build_simulated_driver(into: Path) -> Path:
    """Compile the library below ``into`` unless it is there; returns the folder to put on ``LD_LIBRARY_PATH``.

    Safe beside other builders. Raises NodeError when there is no C compiler, it fails, or ``into`` cannot be written.
    """
    here = Path(__file__).parent
    sources = [here / name for name in _SOURCES]
    digest = hashlib.sha256(b"\0".join([*(s.read_bytes() for s in sources), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    folder = into / f"simulated-nvml-{digest}"
    if (folder / _LIBRARY).is_file():
        return folder
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=".building-") as scratch:
            _compile([str(s) for s in sources if s.suffix == ".c"], Path(scratch) / _LIBRARY)
            folder.mkdir(exist_ok=True)
            (Path(scratch) / _LIBRARY).rename(folder / _LIBRARY)
    except OSError as error:
        raise NodeError(f"cannot build the simulated GPU driver in {into}: {error.strerror}",
                        hint="name a folder that can be written") from error  # fmt: skip
    return folder


def simulated_environment(library_dir: Path, topology: Path) -> dict[str, str]:
    """The variables under which NVML's binding finds the simulated driver. Raises SpecError naming file and line."""
    check_topology(topology)
    before = os.environ.get("LD_LIBRARY_PATH")
    search = f"{library_dir}:{before}" if before else str(library_dir)
    return {"LD_LIBRARY_PATH": search, TOPOLOGY_VARIABLE: str(topology.absolute())}


def check_topology(topology: Path) -> None:
    """Raises SpecError naming file and line when the driver would not accept the file."""
    try:
        with topology.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        raise SpecError(f"cannot read the simulated GPUs of {_shown(topology)}: {getattr(error, 'strerror', None) or error}",
                        hint="write a topology file first: docs/reference/simulated-gpus.md") from error  # fmt: skip
    if len(data) > MAX_FILE_BYTES or b"\0" in data:
        raise SpecError(f"cannot simulate the GPUs of {topology}: it is no text file of at most {MAX_FILE_BYTES // 1024} KiB")
    mistake = first_mistake(data.decode(errors="surrogateescape"))
    if mistake is not None:
        line, why = mistake
        raise SpecError(f"cannot simulate the GPUs of {topology}:{line}: {why}",
                        hint="docs/reference/simulated-gpus.md lists every directive")  # fmt: skip


def _compile(sources: list[str], target: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NodeError("cannot build the simulated GPU driver: there is no C compiler",
                        hint="apt-get install gcc libc6-dev, or the same of your distribution")  # fmt: skip
    try:
        done = subprocess.run(
            [compiler, *_FLAGS, *sources, "-o", str(target)],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise NodeError(f"cannot build the simulated GPU driver: {compiler} took over {_COMPILE_TIMEOUT_S} s") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace")[-400:].strip()
        raise NodeError(f"cannot build the simulated GPU driver: {compiler} said: {said}",
                        hint="apt-get install gcc libc6-dev")  # fmt: skip


def _shown(path: Path) -> str:
    return str(path).replace("\0", "\\0")
