"""The topology file's grammar, and the library's build."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pool_managerd.errors import NodeError, SpecError
from pool_managerd.host import simulation
from pool_managerd.host.simulation import build_simulated_driver, check_topology, simulated_environment
from tests.host.simulated import A100, MIG, MIG_UUIDS, NONE, ONE_24, TWO_24_12, eight_80

GPU = "gpu 0 vram=1GiB"
EVERYTHING = """# a comment, and an empty line

driver 535.1
cuda 12.2   # behind a directive
gpu 0 uuid=GPU-a name="a name # with blanks" pci=00Ff:0a:1F.0 cc=9.0 vram=80GiB reserved=1KiB numa=0 temperature=200 power=0
gpu 7 vram=1B utilization=100 ecc=off persistence=off
mig 7 uuid=MIG-a/1/2 vram=10GiB profile=1g.10gb gi=1 ci=0
nvlink 0 7
nvlink 0 switch
process gpu=0 pid=1 vram=unknown
process mig=MIG-a/1/2 pid=4194304 vram=2MiB kind=graphics
usage gpu=7 vram=0B
engines vram=rss
xid gpu=0 code=79 serial=1
ecc gpu=0 uncorrected=3
pending gpu=0
fault init=18
fault scan=0
fault hang=init
fault abort=scan
fault gpu=0 error=15
fault gpu=0 gone
memory gpu=0 info=unsupported
pids namespace=outer
"""
GOOD = [NONE, ONE_24, TWO_24_12, eight_80(), A100, MIG, EVERYTHING, "", "#", "\n\n", f'{GPU} "name=a b"']
BAD = [
    "gpus 0", "gpu", "gpu x vram=1GiB", "gpu -1 vram=1GiB", "gpu 1000 vram=1GiB", "gpu 0", "gpu 0 vram=1", "gpu 0 vram=GiB",
    "gpu 0 vram=1.5GiB", "gpu 0 vram=1GB", "gpu 0 vram=99999999GiB", f"{GPU} vram=1GiB", f"{GPU} colour=red", f"{GPU} again",
    f"{GPU} uuid=MIG-a", f"{GPU} uuid=GPU-", f"{GPU} uuid=GPU-a_b", f"{GPU} uuid=GPU-{'a' * 76}", f"{GPU} name=",
    f'{GPU} name="a', f"{GPU} name={'a' * 96}", f"{GPU} pci=01:00.0", f"{GPU} pci=0000:01:00.1", f"{GPU} pci=", f"{GPU} cc=8",
    f"{GPU} cc=8.x", f"{GPU} cc=", f"{GPU} cc=8.6.1", f"{GPU} numa=1024", f"{GPU} ecc=yes", f"{GPU} reserved=2GiB",
    f"{GPU} reserved=", f"{GPU}\n{GPU}", f"{GPU}\ngpu 1 vram=1GiB uuid=GPU-00000000-0000-0000-0000-000000000000",
    "mig 0 uuid=MIG-a vram=1GiB", f"{GPU}\nmig 0 vram=1GiB", f"{GPU}\nmig 0 uuid=GPU-a vram=1GiB", f"{GPU}\nmig 0 uuid=MIG-a",
    f"{GPU}\nnvlink 0", f"{GPU}\nnvlink 0 0", f"{GPU}\nnvlink 0 1", f"{GPU}\nnvlink switch 0", f"{GPU}\nnvlink 0 switch x",
    f"{GPU}\n" + "nvlink 0 switch\n" * 37, f"{GPU}\nprocess gpu=0 vram=1GiB", f"{GPU}\nprocess gpu=0 pid=1",
    f"{GPU}\nprocess pid=1 vram=1GiB", f"{GPU}\nprocess gpu=1 pid=1 vram=1GiB", f"{GPU}\nprocess mig=MIG-a pid=1 vram=1GiB",
    f"{GPU}\nprocess gpu=0 pid=4194305 vram=1GiB", f"{GPU}\nprocess gpu=0 pid=1 vram=1GiB kind=other", f"{GPU}\nusage gpu=0",
    f"{GPU}\nusage vram=1GiB", f"{GPU}\nxid gpu=0 code=79", f"{GPU}\nxid gpu=0 serial=1", f"{GPU}\necc gpu=0", "pending gpu=0",
    f"{GPU}\npending gpu=0 now", f"{GPU}\nmemory gpu=0", f"{GPU}\nmemory gpu=0 info=some", "fault", "fault init=x",
    "fault init=1000", "fault hang=later", "fault hang=init abort=init", f"{GPU}\nfault gpu=0", f"{GPU}\nfault gpu=0 lost",
    f"{GPU}\nfault gpu=1 gone", f"{GPU}\nfault gone gpu=0", "engines", "engines vram=all", "engines vram=rss more", "driver",
    "driver 1 2", 'driver ""', f"driver {'1' * 80}", "cuda 12", "cuda twelve.0", "pids", "pids namespace=inner", '"',
    f"{GPU} " + "a " * 40,
]  # fmt: skip


Mistake = Callable[[str], tuple[int, str] | None]


@pytest.fixture(scope="module")
def mistake(simulated_driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Mistake:
    """The line that the driver finds wrong, and why; None when it takes the text."""
    path = tmp_path_factory.mktemp("grammar") / "gpus"

    def found(text: str) -> tuple[int, str] | None:
        path.write_text(text)
        try:
            check_topology(simulated_driver, path)
        except SpecError as error:
            line, _, why = error.message.partition(f"{path}:")[2].partition(": ")
            return int(line), why
        return None

    return found


@pytest.mark.parametrize("text", GOOD)
def test_what_is_right_is_taken(text: str, mistake: Mistake) -> None:
    assert mistake(text if text.endswith("\n") or not text else text + "\n") is None


@pytest.mark.parametrize("text", BAD)
def test_a_line_that_is_wrong_is_named_with_the_reason(text: str, mistake: Mistake) -> None:
    found = mistake(f"{text}\n")
    assert found is not None and found[0] == text.rstrip("\n").count("\n") + 1
    assert found[1] and "well formed" not in found[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{GPU} colour=red", "gpu knows no 'colour=red' here"), ("gpu 0", "gpu needs vram="),
        ("mig 0 uuid=MIG-a", "no gpu 0 above"),
        (f"{GPU} numa=1024", "numa= must be a whole number up to 1023"), (f"{GPU} ecc=yes", "ecc= must be on or off"),
        (f"{GPU}\npending mig=MIG-a", "no mig MIG-a above"), (f"{GPU}\nusage vram=1GiB", "usage needs either gpu= or mig="),
        (f"{GPU} reserved=2", "reserved= must be a size with a unit"),
        ('"', "quotation mark"), (f"{GPU} " + "a " * 40, "32 words"),
    ],
)  # fmt: skip
def test_the_reason_says_what_is_missing_or_too_much(text: str, why: str, mistake: Mistake) -> None:
    assert why in str(mistake(f"{text}\n"))


def test_a_line_without_an_end_is_called_half_written(mistake: Mistake) -> None:
    found = mistake(ONE_24 + GPU)
    assert found is not None and found[0] == 4 and "half written" in found[1]


WORDS = [
    "gpu", "mig", "nvlink", "process", "usage", "engines", "xid", "ecc", "pending", "fault", "memory", "pids", "driver", "cuda",
    "0", "1", "00", "switch", "gone", "12.8", "vram=1GiB", "vram=rss", "vram=unknown", "uuid=GPU-a", "uuid=MIG-a", "gpu=0",
    "gpu=1", "mig=MIG-a", "pid=1", "code=1", "serial=1", "uncorrected=1", "init=18", "hang=scan", "error=15", "info=unsupported",
    "namespace=own", "kind=compute", "name=a", 'name="a b"', "cc=8.6", "numa=0", "#", '"', "=", "pci=0000:01:00.0", "reserved=1B",
]  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_are_taken_or_refused_with_a_reason(mistake: Mistake, lines: list[str]) -> None:
    found = mistake("".join(f"{line}\n" for line in [GPU, *lines]))
    assert found is None or (2 <= found[0] <= len(lines) + 1 and found[1] and "well formed" not in found[1])


def test_a_file_that_is_missing_or_wrong_is_refused_before_anything_starts(tmp_path: Path, simulated_driver: Path) -> None:
    file = tmp_path / "gpus"
    with pytest.raises(SpecError, match=r"cannot read the simulated GPUs of .*/gpus: No such file"):
        check_topology(simulated_driver, file)
    file.write_text(ONE_24 + "gpu 0 vram=1GiB\n")
    with pytest.raises(SpecError, match=r"/gpus:4: gpu 0 is there twice"):
        check_topology(simulated_driver, file)
    file.write_bytes(b"\0" * 10)
    with pytest.raises(SpecError, match="no text file"):
        check_topology(simulated_driver, file)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(SpecError, match="at most 256 KiB"):
        check_topology(simulated_driver, file)


def test_the_driver_is_put_before_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpus").write_text(ONE_24)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    found = simulated_environment(Path("/lib-dir"), tmp_path / "gpus")
    assert found == {"LD_LIBRARY_PATH": "/lib-dir:/opt/lib", "POOL_MANAGERD_SIMULATED_GPUS": str(tmp_path / "gpus")}


def test_builders_at_once_build_one_whole_library_and_later_ones_reuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: build_simulated_driver(tmp_path / "new"), range(3)))
    (folder,) = folders
    assert [p.name for p in folder.iterdir()] == ["libnvidia-ml.so.1"] and list((tmp_path / "new").iterdir()) == [folder]
    ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    assert build_simulated_driver(tmp_path / "new") == folder


def test_without_a_compiler_or_a_place_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match=r"cannot build the simulated GPU driver in .*: Not a directory"):
        build_simulated_driver(tmp_path / "file" / "below")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeError, match="there is no C compiler") as caught:
        build_simulated_driver(tmp_path / "new")
    assert caught.value.hint is not None and "apt-get install gcc" in caught.value.hint


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(NodeError, match="cc said: no such header"):
        build_simulated_driver(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    folder = Path(simulation.__file__).parent
    sources = [str(folder / name) for name in ("simulated_topology.c", "simulated_nvml.c")]
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(["cc", *flags, *sources, "-o", str(tmp_path / "x.so")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_every_directive_is_documented(mistake: Mistake) -> None:
    page = (Path(simulation.__file__).parents[3] / "docs/reference/simulated-gpus.md").read_text()
    _, text = mistake("?\n") or (0, "")
    for directive in text.rpartition("there are ")[2].split(", "):
        assert f"\n| `{directive} " in page, directive
    example = page.partition("```text\n")[2].partition("```")[0]
    assert mistake(example) is None and example.count("\n") > 5 and MIG_UUIDS
