from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime import procfs
from pool_managerd.runtime.environment import engine_environment
from pool_managerd.runtime.isolation import read_back
from pool_managerd.runtime.launcher import LaunchOptions
from pool_managerd.runtime.reach import ENTER, READ, Need, User, first_obstacle
from pool_managerd.runtime.spawner import Spawner
from tests.runtime.support import Bench, sh

HOME = LaunchOptions(profile="home")
DEV = LaunchOptions(profile="dev")
STRANGER = User("stranger", 4242, 4242, (4242, 4343))
NO_CAPABILITIES = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)


def private_binary(root: Path) -> Path:
    """A copy of sleep below a directory that only root may enter."""
    folder = root / "private"
    folder.mkdir(mode=0o700)
    binary = folder / "engine"
    binary.write_bytes(Path("/bin/sleep").read_bytes())
    binary.chmod(0o755)
    return binary


@pytest.mark.usefixtures("as_root")
async def test_roots_engines_run_as_nobody_without_any_capability(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"), options=HOME)
    status = procfs.status(process.pid) or {}
    nobody = pwd.getpwnam("nobody")
    assert status["Uid"].split() == [str(nobody.pw_uid)] * 4
    assert status["Gid"].split() == [str(nobody.pw_gid)] * 4
    assert "0" not in status["Groups"].split()
    assert status["NoNewPrivs"] == "1"
    assert status | NO_CAPABILITIES == status
    assert process.isolation == "user:nobody,no_new_privs,no_caps"
    assert process.notice is None
    assert (bench.root / "work/p").owner() == "nobody"


@pytest.mark.usefixtures("as_root")
async def test_an_engine_cannot_read_or_forge_its_record(bench: Bench) -> None:
    record = await bench.run(
        sh(f"cat {bench.root}/shims/* && exit 1; echo x > {bench.root}/shims/x && exit 2; exit 0"), options=HOME
    )
    assert record.code == 0


@pytest.mark.usefixtures("as_root")
async def test_the_engine_user_can_be_chosen(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"), options=LaunchOptions(engine_user="daemon"))
    assert process.isolation == "user:daemon,no_new_privs,no_caps"


@pytest.mark.usefixtures("as_root")
async def test_an_unknown_engine_user_is_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match="there is no such user") as caught:
        await bench.launch(sh("exit 0"), options=LaunchOptions(engine_user="nosuchuser"))
    assert caught.value.hint


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("profile", ["home", "cloud"])
async def test_a_binary_out_of_reach_is_refused_with_the_path_that_closes_the_way(bench: Bench, root: Path, profile: str) -> None:
    binary = private_binary(root)
    with pytest.raises(EngineError, match="preload failed: cannot run") as caught:
        await bench.launch(PreparedEngine("p", str(binary)), options=LaunchOptions(profile=profile))  # type: ignore[arg-type]
    assert f"{root}/private may not be entered by user 'nobody' (mode 0700" in caught.value.message
    assert "daemon.engine_user" in (caught.value.hint or "")


@pytest.mark.usefixtures("as_root")
async def test_in_dev_a_binary_out_of_reach_runs_as_root_without_capabilities_and_says_so(bench: Bench, root: Path) -> None:
    binary = private_binary(root)
    process = await bench.launch(PreparedEngine("p", str(binary), ("60",)), options=DEV)
    status = procfs.status(process.pid) or {}
    assert status["Uid"].split() == ["0"] * 4
    assert status["NoNewPrivs"] == "1"
    assert status | NO_CAPABILITIES == status
    assert process.isolation == "no_new_privs,no_caps"
    assert f"{root}/private may not be entered" in (process.notice or "")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("place", ["model", "flag"])
async def test_a_model_that_the_user_may_not_read_is_named(bench: Bench, root: Path, place: str) -> None:
    model = root / "m.gguf"
    model.write_bytes(b"GGUF")
    model.chmod(0o600)
    engine = sh("exit 0", model_path=str(model)) if place == "model" else PreparedEngine("p", "/bin/sh", ("-m", str(model)))
    with pytest.raises(EngineError, match=r"m\.gguf may not be read by user 'nobody'"):
        await bench.launch(engine, options=HOME)


@pytest.mark.usefixtures("as_root")
async def test_a_runtime_directory_out_of_reach_is_named(root: Path) -> None:
    (root / "closed").mkdir(mode=0o700)
    bench = Bench(root / "closed" / "run", Spawner())
    with pytest.raises(EngineError, match="closed may not be entered"):
        await bench.launch(sh("exit 0"), options=HOME)
    await bench.close()


# Everything is imported before the user changes: the interpreter's own library may be closed to others.
_AS_NOBODY = """
import asyncio, os, sys
from pathlib import Path
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.spawner import Spawner

async def main(root, python):
    spawner = Spawner(python)
    launcher = Launcher(spawner, RuntimeFiles(root), LaunchOptions(profile="cloud", engine_user="root"))
    process = await launcher.launch(PreparedEngine("p", "/bin/sleep", ("60",)), epoch=1, grace_ms=1000)
    print(process.isolation, process.notice, os.stat(root / "work" / "p").st_uid, sep="|")
    process.stop(1000)
    record = await process.wait()
    print(record.signal, record.stopped_by_us, sep="|")
    await spawner.close()

os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.umask(0o022)
with asyncio.Runner() as runner:
    runner.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.usefixtures("as_root")
def test_a_daemon_that_is_not_root_runs_engines_as_itself_without_new_privileges(root: Path) -> None:
    source = Path(__file__).parents[2] / "src"
    forkserver = source / "pool_managerd" / "runtime" / "forkserver.py"
    nobody = User("nobody", 65534, 65534, (65534,))
    python = "/usr/bin/python3"
    obstacle = first_obstacle([Need(python, ENTER), Need(str(forkserver), READ)], nobody)
    if obstacle is not None or not Path(python).exists():
        pytest.skip(f"user nobody cannot run the fork server here: {obstacle}")
    root.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(root / "run"), python],
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "no_new_privs,no_caps|engine_user 'root' is ignored: only root can change users|65534"
    assert second == "15|True"


def test_what_is_read_back_is_what_the_kernel_says() -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    assert read_back(ended.pid) == "unknown"
    expected = "none" if os.geteuid() == 0 else "no_caps"
    assert read_back(os.getpid()) in ("none", expected)


def test_a_walk_names_the_first_closed_door(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("x")
    (root / "link").symlink_to("a/b/../b/file")
    need = Need(str(root / "link"), READ)
    assert first_obstacle([need], STRANGER) is None
    (root / "a" / "b").chmod(0o700)
    obstacle = first_obstacle([need], STRANGER)
    assert obstacle is not None
    assert obstacle.path == str(root / "a" / "b")
    assert str(obstacle).endswith(f"(on the way to {root}/link)")


@pytest.mark.parametrize(("mode", "user", "allowed"), [
    (0o604, STRANGER, True),
    (0o640, STRANGER, False),
    (0o640, User("member", 4242, 4242, (4242, 0)), True),
    (0o604, User("member", 4242, 4242, (4242, 0)), False),
    (0o044, User("owner", os.getuid(), 4242, (4242,)), False),
])  # fmt: skip
def test_the_class_of_the_user_decides_alone(root: Path, mode: int, user: User, allowed: bool) -> None:
    file = root / "file"
    file.write_text("x")
    os.chown(file, os.getuid(), 0 if os.getuid() == 0 else os.getgid())
    if os.getuid() != 0 and 0 in user.groups:
        pytest.skip("needs a file of group 0")
    file.chmod(mode)
    assert (first_obstacle([Need(str(file), READ)], user) is None) is allowed


def test_a_loop_of_links_ends(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    obstacle = first_obstacle([Need(str(root / "a"), READ)], STRANGER)
    assert obstacle is not None
    assert "loop" in obstacle.reason


def test_what_is_missing_is_not_forbidden(root: Path) -> None:
    assert first_obstacle([Need(str(root / "no" / "such"), READ)], STRANGER) is None


def test_an_engine_inherits_what_it_needs_and_no_secret() -> None:
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_CACHE_PATH": "/c",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_API_KEY": "secret",
        "CUDA_TOKEN": "secret",
        "AUTH_TOKEN": "secret",
        "HOME": "/root",
        "PYTHONPATH": "/x",
    }
    made = engine_environment(inherited, {"PATH": "/own"}, home="/w", nonce="n")
    assert made == {
        "PATH": "/own",
        "LC_ALL": "C",
        "CUDA_CACHE_PATH": "/c",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "HOME": "/w",
        "POOL_MANAGERD_NONCE": "n",
    }
