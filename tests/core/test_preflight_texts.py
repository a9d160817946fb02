"""What a preflight says, word for word: it is read by people, and its remedies are pasted into a shell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pool_managerd.core.gpu.devices import DeviceScan, ScanProblem
from pool_managerd.core.preflight import Finding, Folder, HostFacts, Wants, check
from tests.core.test_preflight import GIB, MIB, NO_CUDA, gpu, machine, pools

TEXTS = Path(__file__).parent / "preflight_texts"

NEGLECTED = machine(
    gpu(0, persistence_mode=False, reset_pending=True), gpu(1, unreadable="UNKNOWN (999)"), gpu(2, mig_enabled=True),
    tools={}, device_nodes=frozenset({"nvidia-nvswitchctl"}), fabric_manager=False, memlock_bytes=8 * MIB, open_files=64,
    shm_total_bytes=64 * MIB, ram_available_bytes=GIB // 2, as_root=False, ports_taken=frozenset({1, 9200, 20001}),
    folders=(
        Folder("state", "/s", 1 * MIB), Folder("tmp", "/t", 20 * MIB), Folder("engine", "/e's", problem="read-only"),
        Folder("model-cache", "/m"),
    ),
    setup_problems=(("p0", "no model", "pull it"), ("of another node", "no model", "pull it"), ("p1", "no engine", "")),
    package_problems=(("xllamacpp", "cannot load xllamacpp", "pip install"), ("another", "cannot load another", "")),
)  # fmt: skip
WANTED = pools(
    {"ports": (1,), "engine_cuda": "13.0", "engine_capabilities": ("9.0", "9.0a")},
    {"mode": "source", "mlock": True}, {"mode": "container"},
    profile="cloud", control_port=9200, engine_ports=(20001, 20002),
)  # fmt: skip


def told(findings: Iterable[Finding]) -> str:
    lines = []
    for found in findings:
        lines.append(f"{found.level} {found.code} [{found.subject}] {found.message}")
        lines += [f"    {line}" for line in found.remedy]
    return "\n".join(lines) + "\n"


def assert_told(name: str, facts: HostFacts, wants: Wants) -> None:
    assert told(check(facts, wants)) == (TEXTS / name).read_text()


def test_a_machine_on_which_everything_is_wrong_is_told_so_in_full() -> None:
    assert_told("neglected.txt", NEGLECTED, WANTED)


def test_a_machine_without_gpus_is_told_what_to_install_and_dev_what_its_ram_holds() -> None:
    assert_told("no_cuda.txt", NO_CUDA, pools({"mode": "external"}))
    small = machine(
        tools={}, scan=NO_CUDA.scan, model_bytes={"p0": 3 * GIB, "p1": 5 * GIB}, ram_available_bytes=4 * GIB, ram_total_bytes=None
    )
    assert_told("dev_without_ram.txt", small, pools({}, {}, profile="dev"))
    assert_told("dev.txt", small, pools({}, profile="dev"))


def test_a_driver_that_is_at_fault_is_told_with_what_to_look_at() -> None:
    unseen = machine(scan=DeviceScan(problem=ScanProblem("new", "cannot read the GPUs", "do it")), shared_user="all share one")
    assert_told("unknown_problem.txt", unseen, pools({}, profile="cloud"))
    hidden = machine(gpu(), device_nodes=frozenset({"nvidia-nvswitchctl", "dxg"}), no_user="no uid can be given")
    assert_told("unseen_fabric_manager.txt", hidden, pools({}, simulated=False))
