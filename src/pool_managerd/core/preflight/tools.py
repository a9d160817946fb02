"""The programs that each way of getting an engine or a model needs (ORCH-3202, ORCH-3203)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pool_managerd.core.preflight.facts import HostFacts, PoolWants, Wants
from pool_managerd.core.preflight.findings import FAIL, OK, Finding

UBUNTU_DRIVERS = "ubuntu-drivers"
COMPILERS = ("g++", "clang++")
CONTAINER_TOOLS = ("podman", "docker")
NVIDIA_TOOLKIT = ("nvidia-ctk", "nvidia-container-runtime", "nvidia-container-cli")
# Any of them will do.
_BUILD = (("git",), ("cmake",), ("make", "ninja"), COMPILERS)
_PACKAGES = {
    "apt-get": ("sudo apt-get install -y {}", {"nvcc": "nvidia-cuda-toolkit"}),
    "dnf": ("sudo dnf install -y {}", {"nvcc": "cuda-toolkit", "g++": "gcc-c++", "nvidia-driver": "akmod-nvidia"}),
    "pacman": ("sudo pacman -S --needed {}", {"nvcc": "cuda", "g++": "gcc", "nvidia-driver": "nvidia"}),
    "zypper": ("sudo zypper install -y {}", {"nvcc": "cuda-toolkit", "g++": "gcc-c++", "nvidia-driver": "nvidia-driver-G06"}),
}
PACKAGE_TOOLS = tuple(_PACKAGES)
ALL_TOOLS = (
    *(tool for choice in _BUILD for tool in choice), "nvcc", "nvidia-smi", *CONTAINER_TOOLS,
    *NVIDIA_TOOLKIT, *PACKAGE_TOOLS, UBUNTU_DRIVERS,
)  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class MissingTool:
    """A program that is not on PATH, the pools that need it, and the command that installs it."""

    tool: str
    pools: tuple[str, ...]
    remedy: str


def missing_tools(facts: HostFacts, wants: Wants) -> tuple[MissingTool, ...]:
    """Sorted by name: the same machine and wants always give the same list."""
    needed: dict[tuple[str, ...], list[str]] = {}
    for pool in wants.local_pools:
        for choice in _needs(pool, facts, wants):
            needed.setdefault(choice, []).append(pool.pool_id)
    absent = (choice for choice in needed if not any(tool in facts.tools for tool in choice))
    return tuple(sorted(MissingTool(" or ".join(c), tuple(sorted(set(needed[c]))), install(c[0], facts)) for c in absent))


def tool_findings(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    missing = missing_tools(facts, wants)
    for one in missing:
        message = f"cannot find {one.tool} on PATH, which {_pools(one.pools)} needs"
        yield Finding("missing_tool", FAIL, one.tool, message, (one.remedy,))
    modes = sorted({pool.mode for pool in wants.local_pools})
    if modes and not missing:
        yield Finding("tools", OK, ", ".join(modes), "all tools that the configured modes need are on PATH")
    containers = tuple(sorted(pool.pool_id for pool in wants.local_pools if pool.mode == "container"))
    if containers and wants.gpu_only and not facts.cdi_files and not any(tool in facts.tools for tool in NVIDIA_TOOLKIT):
        remedy = (install("nvidia-container-toolkit", facts), "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml")
        message = f"cannot give a GPU to a container: no NVIDIA toolkit and no CDI description, which {_pools(containers)} needs"
        yield Finding("container_gpu", FAIL, "NVIDIA container toolkit", message, remedy)


def install(tool: str, facts: HostFacts) -> str:
    """The command that gets ``tool`` on a machine with these package managers; Debian's where none is known."""
    command, names = _PACKAGES[next((name for name in PACKAGE_TOOLS if name in facts.tools), "apt-get")]
    return command.format(names.get(tool, tool))


def install_driver(facts: HostFacts) -> str:
    """The command that gets NVIDIA's driver."""
    return "sudo ubuntu-drivers install" if UBUNTU_DRIVERS in facts.tools else install("nvidia-driver", facts)


def _needs(pool: PoolWants, facts: HostFacts, wants: Wants) -> Iterator[tuple[str, ...]]:
    if pool.mode == "source":
        yield from _BUILD
        if wants.gpu_only or facts.gpus:
            yield ("nvcc",)
    elif pool.mode == "container":
        yield CONTAINER_TOOLS


def _pools(pool_ids: tuple[str, ...]) -> str:
    shown = ", ".join(pool_ids[:4]) + (f" and {len(pool_ids) - 4} more" if len(pool_ids) > 4 else "")
    return f"pool {shown}"
