"""RAM: the machine's, or what its control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pool_managerd.core.cgroups import memory_groups
from pool_managerd.host.memory import available_ram_bytes, group_use, meminfo, total_ram_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:  100 kB\nMemAvailable:    600 kB\nHugePages_Total:  0\n"
KIB = 1024


def write(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, limit: str, used: int, *, group: str = "/a/b", at: str = "a") -> Path:
    place = f"sys/fs/cgroup/{at}"
    return write(root, **{
        "proc/self/cgroup": f"0::{group}\n", f"{place}/memory.max": f"{limit}\n", f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": "anon 1\ninactive_file 1024\n",
    })  # fmt: skip


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    root = v2(tmp_path, "max", 0)
    assert (available_ram_bytes(root), total_ram_bytes(root)) == (600 * KIB, 1000 * KIB)


def test_a_limit_of_any_group_above_counts_and_idle_page_cache_does_not(tmp_path: Path) -> None:
    root = v2(tmp_path, str(300 * KIB), 101 * KIB)
    assert (available_ram_bytes(root), total_ram_bytes(root)) == (200 * KIB, 300 * KIB)


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    root = v2(tmp_path, str(300 * KIB), 51 * KIB, group="/kubepods/pod1/c1", at=".")
    assert available_ram_bytes(root) == 250 * KIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert available_ram_bytes(v2(tmp_path, str(300 * KIB), 400 * KIB)) == 0


def test_a_v1_limit_counts_beside_an_empty_v2_hierarchy(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/memory/x"
    root = write(tmp_path, **{
        "proc/self/cgroup": "9:memory:/x\n3:cpu,cpuacct:/y\n0::/\n", f"{place}/memory.limit_in_bytes": str(200 * KIB),
        f"{place}/memory.usage_in_bytes": str(150 * KIB), f"{place}/memory.stat": f"total_inactive_file {50 * KIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert (available_ram_bytes(root), total_ram_bytes(root)) == (100 * KIB, 200 * KIB)


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert total_ram_bytes(write(tmp_path, **{"proc/self/cgroup": ""})) == 1000 * KIB


def test_what_is_not_meminfo_is_refused() -> None:
    with pytest.raises(ValueError, match="no MemTotal"):
        meminfo("MemTotal: 5 kB\n")


def test_the_parts_read_what_the_kernel_writes() -> None:
    assert memory_groups("12:hugetlb,memory:/v1\n1:name=systemd:/s\n0::/v2\n") == ("/v1", "/v2")
    assert memory_groups("garbage") == (None, None)
    assert group_use("10\n", "inactive_file 30\n", inactive_file="inactive_file") == 0


def test_what_this_machine_tells_is_plausible() -> None:
    assert 0 < available_ram_bytes() <= total_ram_bytes() < 1 << 50
