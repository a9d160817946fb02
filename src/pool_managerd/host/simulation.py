"""A simulated NVIDIA driver: built from source, driven by a topology file that may change while it runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pool_managerd.errors import NodeError, SpecError

TOPOLOGY_VARIABLE = "POOL_MANAGERD_SIMULATED_GPUS"
_LIBRARY = "libnvidia-ml.so.1"
_SOURCES = ("simulated_topology.h", "simulated_topology.c", "simulated_nvml.c")
_FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 60
_MAX_FILE_BYTES = 256 * 1024
_MAX_REASON_BYTES = 512


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
    """The variables under which NVML's binding finds the simulated driver."""
    before = os.environ.get("LD_LIBRARY_PATH")
    search = f"{library_dir}:{before}" if before else str(library_dir)
    return {"LD_LIBRARY_PATH": search, TOPOLOGY_VARIABLE: str(topology.absolute())}


def check_topology(library_dir: Path, topology: Path) -> None:
    """Raises SpecError naming file and line when the driver in ``library_dir`` does not accept the file.

    The driver is asked itself: its reader is the only one.
    """
    try:
        with topology.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        shown = str(topology).replace("\0", "\\0")
        raise SpecError(f"cannot read the simulated GPUs of {shown}: {getattr(error, 'strerror', None) or error}",
                        hint="write a topology file first: docs/reference/simulated-gpus.md") from error  # fmt: skip
    if len(data) > _MAX_FILE_BYTES or b"\0" in data:
        raise SpecError(f"cannot simulate the GPUs of {topology}: it is no text file of at most {_MAX_FILE_BYTES // 1024} KiB")
    why = ctypes.create_string_buffer(_MAX_REASON_BYTES)
    line = ctypes.CDLL(str(library_dir / _LIBRARY)).simulatedCheck(os.fsencode(topology), why, ctypes.c_size_t(len(why)))
    if line > 0:
        raise SpecError(f"cannot simulate the GPUs of {topology}:{line}: {why.value.decode(errors='replace')}",
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
