"""Preflight: what fails, what only warns, what each remedy is, and what can never be waved through."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot, ScanProblem
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.preflight import (
    Finding,
    Folder,
    HostFacts,
    PoolWants,
    Report,
    Wants,
    assert_gpu_only,
    assert_passed,
    check,
    missing_tools,
)  # fmt: skip
from pool_managerd.errors import NodeError

GIB, MIB = 1 << 30, 1 << 20
TOOLS = {"nvidia-smi": "/usr/bin/nvidia-smi"}
PROBLEMS = (
    "nvml_unavailable", "no_driver", "driver_mismatch", "nvml_hung", "nvml_crashed", "nvml_error", "released", "not_scanned",
)  # fmt: skip


def gpu(index: int = 0, **changes: Any) -> DeviceSnapshot:
    plain = DeviceSnapshot(
        index, f"GPU-{index}", 24 * GIB, 23 * GIB, "8.9", "RTX 4090", f"00000000:0{index}:00.0", persistence_mode=True
    )
    return dataclasses.replace(plain, **changes)


def machine(*devices: DeviceSnapshot, **changes: Any) -> HostFacts:
    """A well kept machine with these GPUs."""
    good = HostFacts(
        tools=TOOLS,
        scan=DeviceScan(devices, driver_version="570.86.15", cuda_version="12.8"),
        device_nodes=frozenset({"nvidia0", "nvidiactl", "nvidia-uvm"}),
        memlock_bytes=None,
        open_files=1024,
        shm_total_bytes=8 * GIB,
        ram_total_bytes=64 * GIB,
        ram_available_bytes=60 * GIB,
        folders=(Folder("state", "/srv/state", 100 * GIB), Folder("tmp", "/var/tmp", 100 * GIB)),
        as_root=True,
    )
    return dataclasses.replace(good, **changes)


def stale(code: str, *devices: DeviceSnapshot) -> HostFacts:
    return machine(scan=DeviceScan(devices, problem=ScanProblem(code, f"cannot read the GPUs: {code}", "do it")))


def pools(*changes: dict[str, Any], **wants: Any) -> Wants:
    return Wants(pools=tuple(PoolWants(**{"pool_id": f"p{n}"} | change) for n, change in enumerate(changes)), **wants)


def codes(facts: HostFacts, wants: Wants, level: str = "fail") -> list[str]:
    return [finding.code for finding in check(facts, wants) if finding.level == level]


def the(facts: HostFacts, wants: Wants, code: str) -> Finding:
    (found,) = [finding for finding in check(facts, wants) if finding.code == code]
    return found


NO_CUDA = machine(tools={}, scan=DeviceScan(problem=ScanProblem("nvml_unavailable", "cannot load NVML")))


def test_a_well_kept_machine_has_nothing_but_good_findings() -> None:
    findings = check(machine(gpu()), pools({"mask": DeviceMask((0,))}))
    assert {finding.level for finding in findings} == {"ok"}
    assert {"cuda", "gpus", "tools", "folders", "ram"} == {finding.code for finding in findings}
    assert Report("home", findings).ok


@pytest.mark.parametrize("profile", ["home", "cloud"])
def test_without_nvcc_and_nvidia_smi_there_is_no_start_and_the_texts_are_the_fixed_ones(profile: str) -> None:
    found = the(NO_CUDA, Wants(profile), "gpu_required")
    assert found.level == "fail"
    assert "GPU-only enforcement" in found.message
    assert "nvcc/nvidia-smi not found" in found.message
    assert "profile: dev" in found.remedy


@pytest.mark.parametrize("tool", ["nvcc", "nvidia-smi"])
def test_one_of_the_two_tools_is_enough(tool: str) -> None:
    assert codes(machine(gpu(), tools={tool: f"/usr/bin/{tool}"}), Wants()) == []


def test_dev_runs_without_a_gpu_and_says_so() -> None:
    findings = check(NO_CUDA, Wants("dev"))
    assert {finding.level for finding in findings} == {"ok"}
    assert "on the CPU" in the(NO_CUDA, Wants("dev"), "no_gpu").message


def test_a_driver_that_lists_no_gpu_is_refused_like_no_driver() -> None:
    found = the(machine(), Wants(), "gpu_required")
    assert "GPU-only enforcement: the driver lists no GPU" in found.message
    assert "nvidia-smi -L" in found.remedy


def test_the_gpu_cannot_be_waved_through() -> None:
    wants = Wants(allow=frozenset({"gpu_required", "gpu_required:CUDA", "nvml_unavailable"}))
    assert codes(NO_CUDA, wants) == ["gpu_required"]
    assert codes(NO_CUDA, wants, "overridden") == ["nvml_unavailable"]


@pytest.mark.parametrize("code", PROBLEMS)
def test_every_problem_of_the_scan_is_a_finding_with_a_remedy(code: str) -> None:
    found = the(stale(code, gpu()), Wants(), code)
    assert found.level == ("warn" if code in ("released", "not_scanned") else "fail")
    assert found.remedy
    assert found.message == f"cannot read the GPUs: {code}"
    if code != "nvml_unavailable":
        assert the(stale(code, gpu()), Wants("dev"), code).level == found.level, "no start goes ahead in profile dev either"


def test_a_pool_that_cannot_be_set_up_fails_with_the_remedy_that_its_start_would_name() -> None:
    problems = (("p0", "cannot use /m.gguf: there is no such file", "check the path"), ("x", "?", ""))
    facts = machine(gpu(), setup_problems=problems)
    found = the(facts, pools({}), "pool_setup")
    assert (found.level, found.subject, found.remedy) == ("fail", "pool p0", ("# check the path",))
    assert "x" not in {finding.subject for finding in check(facts, pools({}))}, "of pools that are asked about"


def test_an_unknown_problem_passes_on_its_own_hint() -> None:
    assert the(stale("martian"), Wants(), "martian").remedy == ("# do it",)


def test_a_mask_that_names_no_gpu_fails_and_lists_what_exists() -> None:
    found = the(machine(gpu()), pools({"mask": DeviceMask((0, 7))}), "device_mask")
    assert found.subject == "pool p0"
    assert "there is no device 7; there are 0 (RTX 4090)" in found.message
    assert "nvidia-smi -L" in found.remedy


def test_a_mask_is_not_checked_by_stale_devices_or_for_an_engine_elsewhere() -> None:
    mask = DeviceMask((7,))
    assert "device_mask" not in codes(stale("nvml_hung", gpu()), pools({"mask": mask}))
    assert "device_mask" not in codes(machine(gpu()), pools({"mask": mask, "mode": "external"}))


@pytest.mark.parametrize(("built", "fails"), [("12.9", True), ("13.0", True), ("12.8", False), ("11.8", False), (None, False)])
def test_a_driver_older_than_the_engines_cuda_is_refused(built: str | None, fails: bool) -> None:
    wants = pools({"engine_cuda": built})
    assert ("driver_too_old" in codes(machine(gpu()), wants)) is fails


@pytest.mark.parametrize(
    ("built", "fails"),
    [
        ((), False),
        (("8.9",), False),
        (("8.0",), False),
        (("9.0",), True),
        (("7.5", "9.0"), True),
        (("7.5+PTX",), False),
        (("9.0+PTX",), True),
    ],
)
def test_an_engine_built_for_other_gpus_is_refused(built: tuple[str, ...], fails: bool) -> None:
    wants = pools({"engine_capabilities": built})
    assert ("compute_capability" in codes(machine(gpu()), wants)) is fails
    if fails:
        assert "CMAKE_CUDA_ARCHITECTURES=89" in the(machine(gpu()), wants, "compute_capability").remedy[0]


@pytest.mark.parametrize(("seen", "level"), [(False, "fail"), (None, "warn"), (True, None)])
def test_nvswitches_need_their_fabric_manager(seen: bool | None, level: str | None) -> None:
    facts = machine(gpu(), fabric_manager=seen)
    assert [f.code for f in check(facts, Wants()) if f.code == "fabric_manager"] == []
    facts = dataclasses.replace(facts, device_nodes=facts.device_nodes | {"nvidia-nvswitchctl"})
    assert [f.level for f in check(facts, Wants()) if f.code == "fabric_manager"] == ([level] if level else [])


def test_the_surroundings_of_a_driver_are_checked() -> None:
    facts = machine(
        gpu(persistence_mode=False), gpu(1, reset_pending=True), gpu(2, error="GPU is lost"), gpu(3, mig_enabled=True),
        device_nodes=frozenset({"nvidiactl"}), memlock_bytes=8 * MIB, shm_total_bytes=64 * MIB,
    )  # fmt: skip
    assert the(facts, Wants(), "nvidia_uvm").remedy == ("sudo nvidia-modprobe -u -c=0",)
    assert codes(facts, Wants()) == ["nvidia_uvm"]
    assert the(facts, Wants(), "gpu_reset_pending").remedy == (
        "pool-managerd devices release", "sudo nvidia-smi --gpu-reset -i GPU-1", "pool-managerd devices resume",
    )  # fmt: skip
    unreadable = dataclasses.replace(facts, scan=DeviceScan((gpu(unreadable="UNKNOWN (999)"),)))
    assert the(unreadable, Wants(), "gpu_unreadable").message == "cannot read GPU 0: UNKNOWN (999)"
    warned = ["gpu_reset_pending", "gpu_unreadable", "memlock", "mig_empty", "persistence_mode", "shm"]
    assert codes(facts, Wants(), "warn") == warned


def test_simulated_gpus_need_no_device_files() -> None:
    facts = machine(gpu(persistence_mode=False), tools={}, device_nodes=frozenset())
    assert codes(facts, Wants("dev", simulated=True)) == codes(facts, Wants("dev", simulated=True), "warn") == []
    assert the(facts, Wants("dev", simulated=True), "gpus").message.startswith("simulated: ")


def test_one_gpu_needs_neither_locked_nor_shared_memory_unless_a_pool_locks_its_model() -> None:
    facts = machine(gpu(), memlock_bytes=8 * MIB, shm_total_bytes=64 * MIB)
    assert codes(facts, Wants(), "warn") == []
    locked = dataclasses.replace(facts, model_bytes={"p0": GIB})
    assert codes(locked, pools({"mlock": True}), "warn") == ["memlock"]


@pytest.mark.parametrize(
    ("want", "missing"),
    [
        ({"mode": "source"}, ["cmake", "g++ or clang++", "git", "make or ninja", "nvcc"]),
        ({"mode": "container"}, ["podman or docker"]),
        ({"mode": "binary"}, []),
        ({"mode": "external"}, []),
        ({"mode": "package"}, []),
    ],
)
def test_tools_are_asked_for_by_mode(want: dict[str, Any], missing: list[str]) -> None:
    wants = pools(want)
    found = missing_tools(machine(gpu()), wants)
    assert [one.tool for one in found] == missing
    assert all(one.pools == ("p0",) and one.remedy for one in found)
    assert [f.subject for f in check(machine(gpu()), wants) if f.code == "missing_tool"] == missing


def test_missing_tools_are_sorted_and_name_every_pool_that_needs_them() -> None:
    found = missing_tools(machine(gpu()), pools({"mode": "source"}, {"mode": "source"}, {"mode": "container"}))
    assert list(found) == sorted(found)
    assert {one.tool: one.pools for one in found}["git"] == ("p0", "p1")


def test_either_of_two_tools_will_do() -> None:
    tools = TOOLS | dict.fromkeys(["git", "cmake", "ninja", "clang++", "nvcc", "docker", "nvidia-ctk"], "/x")
    assert missing_tools(machine(gpu(), tools=tools), pools({"mode": "source"}, {"mode": "container"})) == ()


def test_a_cpu_build_in_dev_needs_no_nvcc() -> None:
    assert "nvcc" not in [one.tool for one in missing_tools(NO_CUDA, pools({"mode": "source"}, profile="dev"))]


@pytest.mark.parametrize(
    ("manager", "line"), [("apt-get", "sudo apt-get install -y g++"), ("dnf", "sudo dnf install -y gcc-c++")]
)
def test_the_remedy_speaks_the_machines_own_package_manager(manager: str, line: str) -> None:
    found = missing_tools(machine(gpu(), tools=TOOLS | {manager: "/x"}), pools({"mode": "source"}))
    assert {one.tool: one.remedy for one in found}["g++ or clang++"] == line


def test_a_container_needs_the_toolkit_or_a_cdi_description() -> None:
    bare = machine(gpu(), tools=TOOLS | {"podman": "/x"})
    wants = pools({"mode": "container"})
    assert codes(bare, wants) == ["container_gpu"]
    assert codes(dataclasses.replace(bare, cdi_files=("/etc/cdi/nvidia.yaml",)), wants) == []
    assert codes(dataclasses.replace(bare, tools={**bare.tools, "nvidia-ctk": "/x"}), wants) == []


def test_directories_must_be_writable_and_have_room() -> None:
    folders = (
        Folder("state", "/a", 1 * MIB), Folder("runtime", "/b c", 500 * MIB), Folder("tmp", "/c", problem="/c is no directory"),
        Folder("engine", "/d", None),
    )  # fmt: skip
    facts = machine(gpu(), folders=folders)
    assert codes(facts, Wants()) == ["disk_full", "not_writable"]
    assert codes(facts, Wants(), "warn") == ["disk_low"]
    assert the(facts, Wants(), "disk_low").remedy == ("df -h '/b c'",)


def test_ram_must_hold_the_model_only_where_the_cpu_runs_it() -> None:
    wants, sizes = pools({}, {}, profile="dev"), {"p0": 61 * GIB, "p1": GIB}
    assert codes(dataclasses.replace(NO_CUDA, ram_available_bytes=60 * GIB, model_bytes=sizes), wants) == ["ram"]
    assert codes(machine(gpu(), model_bytes=sizes), dataclasses.replace(wants, profile="home")) == []
    assert codes(machine(gpu(), ram_available_bytes=MIB), Wants(), "warn") == ["ram"]


def test_open_files_must_do_for_all_pools() -> None:
    assert codes(machine(gpu()), pools(*({} for _ in range(10))), "warn") == []
    found = the(machine(gpu()), pools(*({} for _ in range(100))), "open_files")
    assert found.level == "warn"
    assert found.remedy[0] == "ulimit -n 3456"


def test_ports_that_are_taken_are_found() -> None:
    facts = machine(gpu(), ports_taken=frozenset({8080, 9200}))
    wants = pools({"ports": (8080, 8081)}, control_port=9200)
    found = the(facts, wants, "port_taken")
    assert (found.subject, found.level) == ("port 8080", "warn"), "it has another one of its own"
    assert the(facts, pools({"ports": (8080,)}), "port_taken").level == "fail"
    assert the(facts, wants, "control_port").level == "warn"
    assert codes(facts, pools({}, {}, engine_ports=(8080, 8081))) == ["engine_ports"]
    assert codes(facts, pools({}, engine_ports=(8080, 8081))) == []


def test_cloud_fails_where_engines_share_the_daemons_user_whatever_the_kernel_could_do() -> None:
    apart = machine(gpu(), as_root=True)
    assert codes(apart, Wants("cloud")) == []
    for shared in ({"as_root": False}, {"as_root": True, "shared_user": "daemon.engine_user is root"}):
        facts = machine(gpu(), **shared)
        assert codes(facts, Wants("cloud")) == ["isolation"]
        assert codes(facts, Wants("home")) == codes(facts, Wants("home"), "warn") == []


def test_a_root_that_can_give_engines_no_user_fails_in_every_profile() -> None:
    assert codes(machine(gpu(), as_root=True, no_user="cannot choose the engine's user"), Wants("home")) == ["isolation"]


def test_an_override_names_a_code_or_one_subject_and_is_recorded() -> None:
    facts = machine(gpu(), ports_taken=frozenset({8080, 8081}))
    wants = pools({"ports": (8080, 8081)})
    assert codes(facts, wants) == ["port_taken", "port_taken"]
    report = Report("home", check(facts, dataclasses.replace(wants, allow=frozenset({"port_taken:port 8080"}))))
    assert [finding.subject for finding in report.failed] == ["port 8081"]
    assert [finding.subject for finding in report.overridden] == ["port 8080"]
    report = Report("home", check(facts, dataclasses.replace(wants, allow=frozenset({"port_taken"}))))
    assert report.ok
    assert len(report.overridden) == 2


def test_a_report_is_plain_data_with_the_worst_first() -> None:
    facts = machine(gpu(persistence_mode=False), folders=(Folder("state", "/a", 1), Folder("tmp", "/b", GIB * 9)))
    told = Report("home", check(facts, Wants())).to_dict()
    assert (told["ok"], told["profile"]) == (False, "home")
    assert told["findings"][0].keys() == {"code", "level", "subject", "message", "remedy"}
    levels = [finding["level"] for finding in told["findings"]]
    assert levels == sorted(levels, key=["fail", "overridden", "warn", "ok"].index)


def test_everything_that_fails_can_be_raised_as_one_error() -> None:
    assert_passed(Report("home", check(machine(gpu()), Wants())))
    with pytest.raises(NodeError, match="something listens there") as caught:
        assert_passed(Report("home", check(machine(gpu(), ports_taken=frozenset({1})), pools({"ports": (1,)}))), "p0")
    error = caught.value
    assert (error.code, error.pool_id, error.retriable) == ("PREFLIGHT_FAILED", "p0", True)
    assert "ss -ltnp" in str(error.hint)
    with pytest.raises(NodeError, match="GPU-only enforcement: nvcc/nvidia-smi not found") as caught:
        assert_passed(Report("home", check(NO_CUDA, Wants())))
    assert caught.value.code == "GPU_REQUIRED"


def test_gpu_only_is_enforced_at_once() -> None:
    assert_gpu_only(True)
    with pytest.raises(NodeError, match="GPU-only enforcement: nvcc/nvidia-smi not found"):
        assert_gpu_only(False)


def test_an_error_of_a_preflight_is_the_nodes_and_carries_its_findings() -> None:
    with pytest.raises(NodeError) as caught:
        assert_gpu_only(False)
    assert (caught.value.code, caught.value.status, caught.value.retriable) == ("GPU_REQUIRED", 503, False)
    assert caught.value.hint is not None and "profile: dev" in caught.value.hint
    failed = Finding("a", "fail", "s", "first", ("one", "two"))
    with pytest.raises(NodeError, match=r"^cannot start it on this machine: first; second$") as caught:
        assert_passed(Report("home", (failed, Finding("b", "fail", "s", "second"), Finding("c", "warn", "s", "third"))))
    error = caught.value
    assert (error.status, error.hint, error.pool_id) == (503, "one; two", None)
    assert [finding["code"] for finding in error.details["findings"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "code", "level"),
    [
        ({"ram_available_bytes": GIB}, "ram", "ok"), ({"ram_available_bytes": GIB - 1}, "ram", "warn"),
        ({"open_files": 256 + 32}, "open_files", None), ({"open_files": 256 + 31}, "open_files", "warn"),
        ({"shm_total_bytes": GIB}, "shm", None), ({"shm_total_bytes": GIB - 1}, "shm", "warn"),
        ({"memlock_bytes": 64 * MIB}, "memlock", None), ({"memlock_bytes": 64 * MIB - 1}, "memlock", "warn"),
        ({"folders": (Folder("tmp", "/t", 16 * MIB),)}, "disk_full", None),
        ({"folders": (Folder("tmp", "/t", 16 * MIB - 1),)}, "disk_full", "fail"),
        ({"folders": (Folder("state", "/s", 64 * MIB),)}, "disk_full", None),
        ({"folders": (Folder("state", "/s", GIB),)}, "disk_low", None),
        ({"folders": (Folder("state", "/s", GIB - 1),)}, "disk_low", "warn"),
    ],
)  # fmt: skip
def test_what_is_just_enough_is_enough(changes: dict[str, Any], code: str, level: str | None) -> None:
    found = {finding.code: finding.level for finding in check(machine(gpu(0), gpu(1), **changes), pools({}))}
    assert found.get(code) == level


def test_a_model_need_not_fit_into_ram_where_a_gpu_runs_it_or_nothing_does() -> None:
    small = {"model_bytes": {"p0": 9 * GIB}, "ram_available_bytes": 4 * GIB}
    assert the(machine(gpu(), **small), pools({}, profile="dev"), "ram").level == "ok"
    assert the(machine(scan=NO_CUDA.scan, **small), pools({}), "ram").level == "ok"
    assert the(machine(scan=NO_CUDA.scan, **small), pools({}, profile="dev"), "ram").level == "fail"


def test_the_gpus_that_were_found_are_counted() -> None:
    assert [the(machine(*map(gpu, range(n))), Wants(), "gpus").subject for n in (1, 2, 3)] == ["1 GPU", "2 GPUs", "3 GPUs"]


def test_of_many_pools_four_are_named() -> None:
    def needing(count: int) -> str:
        return the(machine(gpu()), pools(*[{"mode": "container"}] * count), "missing_tool").message

    assert needing(4).endswith("which pool p0, p1, p2, p3 needs")
    assert needing(6).endswith("which pool p0, p1, p2, p3 and 2 more needs")


def test_ports_that_several_pools_have_are_warned_of_with_one_for_each() -> None:
    found = the(machine(gpu(), ports_taken=frozenset({9001})), pools({"ports": (9000,)}, {"ports": (9000,)}), "port_shared")
    assert (found.level, found.subject) == ("warn", "port 9000"), "the second start falls back to the range: it does not fail"
    assert found.message == "pools p0 and p1 both have port 9000: whichever starts later runs on one of daemon.engine_ports"
    assert found.remedy == ("provisioning: {ports: [9002]}  # pool p1",)
    three = the(machine(gpu()), pools(*({"ports": (1, 2, n)} for n in (3, 4, 5))), "port_shared")
    assert three.message == "pools p0, p1 and p2 all have ports 1, 2: whichever starts later runs on another of its own"
    assert three.remedy == ("provisioning: {ports: [6]}  # pool p1", "provisioning: {ports: [7]}  # pool p2")
    last = the(machine(gpu()), pools({"ports": (65535,)}, {"ports": (65535,)}), "port_shared")
    assert last.remedy == ("provisioning: {ports: []}  # pool p1",)
    assert not codes(machine(gpu()), pools({"ports": (1, 1)}, {"ports": (2,)}, {"ports": (2,), "mode": "external"}), "warn")


def test_the_daemons_own_port_is_warned_of_as_a_pools() -> None:
    found = the(machine(gpu()), pools({"ports": (9200,)}, {}, control_port=9200), "port_of_daemon")
    assert (found.level, found.subject) == ("warn", "port 9200")
    assert found.message == (
        "pool p0 has port 9200, which is the control API's (daemon.bind): it runs on one of daemon.engine_ports"
    )
    assert found.remedy == ("provisioning: {ports: [9201]}  # pool p0",)
    also = the(machine(gpu()), pools({"ports": (9200, 9300)}, control_port=9200), "port_of_daemon")
    assert also.message.endswith("it runs on another of its own")
    assert the(machine(gpu()), pools({"ports": (65535,)}, control_port=65535), "port_of_daemon").remedy[0].count("65534")
    for wants in (pools({"ports": (9200,)}), pools({"ports": (9200,), "mode": "external"}, control_port=9200)):
        assert "port_of_daemon" not in codes(machine(gpu()), wants)


def test_ports_of_the_pool_itself_leave_the_range_to_others() -> None:
    wants = pools({"ports": (5,)}, {}, {"mode": "external"}, engine_ports=(10, 11))
    assert "engine_ports" not in codes(machine(gpu(), ports_taken=frozenset({9, 10, 12})), wants)
    assert "engine_ports" in codes(machine(gpu(), ports_taken=frozenset({10, 11})), wants)


FACTS = st.builds(
    machine,
    st.builds(
        gpu, persistence_mode=st.sampled_from([True, False, None]), compute_capability=st.sampled_from([None, "7.5", "9.0"])
    ),
    tools=st.sets(st.sampled_from(["nvcc", "git", "podman", "apt-get"])).map(lambda names: dict.fromkeys(names, "/x")),
    device_nodes=st.frozensets(st.sampled_from(["nvidia-uvm", "nvidia-nvswitchctl"])),
    open_files=st.sampled_from([None, 64, 100_000]),
    ram_available_bytes=st.sampled_from([None, 0, GIB * 90]),
    ports_taken=st.frozensets(st.integers(8080, 8084)),
)
WANTS = st.builds(
    Wants,
    st.sampled_from(["home", "cloud", "dev"]),
    st.lists(
        st.builds(
            PoolWants,
            st.sampled_from(["a", "b", "c"]),
            mode=st.sampled_from(["source", "container", "package", "external"]),
            mask=st.sampled_from([None, DeviceMask((0,)), DeviceMask((3,))]),
            ports=st.sampled_from([(), (8080,), (8081, 8082), (8082, 8083)]),
        ),
        max_size=4,
    ).map(tuple),
    engine_ports=st.sampled_from([None, (8080, 8084)]),
)


@given(FACTS, WANTS, st.randoms())
def test_the_order_of_pools_does_not_change_the_judgement(facts: HostFacts, wants: Wants, chance: random.Random) -> None:
    shuffled = list(wants.pools)
    chance.shuffle(shuffled)
    findings = check(facts, wants)
    again = check(facts, dataclasses.replace(wants, pools=tuple(shuffled)))
    assert findings == again
    assert len(set(findings)) == len(findings)


@given(FACTS, WANTS)
def test_whatever_fails_has_a_remedy_and_only_gpu_required_survives_every_override(facts: HostFacts, wants: Wants) -> None:
    findings = check(facts, wants)
    assert all(finding.remedy for finding in findings if finding.level in ("fail", "warn"))
    everything = dataclasses.replace(wants, allow=frozenset(finding.code for finding in findings))
    assert {finding.code for finding in check(facts, everything) if finding.level == "fail"} <= {"gpu_required"}


def test_an_embedded_engine_that_cannot_be_loaded_fails_with_what_to_install() -> None:
    facts = HostFacts(
        package_problems=(("xllamacpp", "cannot load it: a shared library is missing: libgomp.so.1", "apt-get install libgomp1"),)
    )
    found = next(f for f in check(facts, Wants()) if f.code == "engine_package")
    assert (found.level, found.remedy) == ("fail", ("apt-get install libgomp1",)) and "libgomp.so.1" in found.message
