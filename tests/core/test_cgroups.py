"""Control groups as the kernel writes about them."""

from __future__ import annotations

import pytest

from pool_managerd.core.cgroups import counted, memory_groups

HYBRID = "12:cpu,memory:/old/path:1\n3:pids:/other\n1:name=systemd:/system\n0::/new/path\n"


def test_the_memory_group_is_found_in_either_hierarchy() -> None:
    assert memory_groups(HYBRID) == ("/old/path:1", "/new/path")
    assert memory_groups("0::/a\n") == (None, "/a") and memory_groups("4:memory:/b\n") == ("/b", None)
    assert memory_groups("0:cpu:/a\n7::/b\n") == (None, None)


@pytest.mark.parametrize(
    ("key", "number"), [("oom", 3), ("oom_kill", 12345678901234567890), ("high", None), ("max", None), ("low", None)]
)
def test_a_counter_is_read_by_its_whole_name_and_only_where_it_is_a_number(key: str, number: int | None) -> None:
    text = "oom_kill 123456789012345678901\noom 3\noom 4\nmax much\nlow ٣\n"
    assert counted(text, key) == number
