"""What to type to add a package to this installation, by the tool that made it."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path


def command(package: str, *, prefix: Path | None = None) -> str:
    """The whole command. The environment (default: this one) of pipx and of ``uv tool`` is known by the file they leave in it."""
    place = Path(sys.prefix) if prefix is None else prefix
    wanted = f"--no-deps {shlex.quote(package)}"
    python = shlex.quote(_short(place / "bin" / "python"))
    if (place / "pipx_metadata.json").is_file():
        return f"pipx runpip {place.name} install {wanted}"
    if (place / "uv-receipt.toml").is_file() or (prefix is None and importlib.util.find_spec("pip") is None):
        return f"uv pip install --python {python} {wanted}"
    return f"{python} -m pip install {wanted}"


def _short(path: Path) -> str:
    """As a person would type it from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and here != Path("/") else path)
