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
from pool_managerd.runtime.engine_users import UserRules
from pool_managerd.runtime.environment import Places, engine_environment
from pool_managerd.runtime.isolation import read_back
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.reach import ENTER, READ, Need, User, first_obstacle
from pool_managerd.runtime.spawner import Spawner
from tests.runtime.support import Bench, eventually, sh

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
async def test_each_pool_of_root_has_a_uid_of_its_own_that_no_user_has_without_any_capability(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"), options=HOME)
    other = await bench.launch(sh("exec sleep 60", pool_id="q"), options=HOME)
    status = procfs.status(process.pid) or {}
    (uid,) = procfs.uids(process.pid)
    assert 61184 <= uid <= 65519
    assert procfs.uids(other.pid) != {uid}
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    assert status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].split() == []
    assert status["NoNewPrivs"] == "1"
    assert status | NO_CAPABILITIES == status
    assert process.isolation == f"user:{uid},no_new_privs,no_caps"
    assert process.notice is None
    assert (bench.root / "work/p").stat().st_uid == (bench.root / "cache/p").stat().st_uid == uid


@pytest.mark.usefixtures("as_root")
async def test_a_pool_keeps_its_uid_as_long_as_its_files_are_there_and_a_new_one_gets_none_of_them(bench: Bench) -> None:
    await bench.run(sh('echo planted > "$HOME/x"; echo "id $(id -u)"'))
    await bench.run(sh('cat "$HOME/x"; echo "id $(id -u)"'))
    first, again = [line for line in bench.log().splitlines() if line.startswith(b"id ")]
    assert first == again
    assert b"planted" in bench.log()
    launcher = Launcher(bench.spawner, bench.files, HOME)
    await launcher.forget("p")
    assert not [path for path in bench.root.rglob("*") if path.name == "p" or path.name.startswith("engine-p.log")]
    await eventually(lambda: not list((bench.root / "work").iterdir()))
    await bench.run(sh('ls -A "$HOME"'))
    assert [name[:4] for name in bench.log().split()] == [b"tmp."]


@pytest.mark.usefixtures("as_root")
async def test_files_of_another_user_are_not_given_to_an_engine(bench: Bench) -> None:
    await bench.run(sh('echo planted > "$HOME/x"'), options=LaunchOptions(UserRules(user="daemon")))
    await bench.run(sh('ls -A "$HOME"'), options=HOME)
    assert [name[:4] for name in bench.log().split()] == [b"tmp."]


@pytest.mark.usefixtures("as_root")
async def test_one_engine_reads_neither_anothers_environment_nor_its_memory_and_cannot_signal_it(bench: Bench) -> None:
    victim = await bench.launch(sh("exec sleep 60", pool_id="victim", env={"HF_TOKEN": "CANARY"}), options=HOME)
    pid = victim.pid
    tries = (
        f"cat /proc/{pid}/environ && echo READ; head -c 1 /proc/{pid}/mem && echo READ; kill -9 {pid} && echo KILLED; echo done"
    )
    await bench.run(sh(tries, pool_id="thief"), options=HOME)
    log = bench.log("thief")
    assert b"done" in log
    assert not any(word in log for word in (b"CANARY", b"READ", b"KILLED"))
    assert victim.identity.engine_runs()


async def test_an_engine_has_limits_and_processes_are_counted_only_where_they_are_one_pools(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    lines = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[1] for line in lines}
    assert limits["Max core file size"] == "0"
    assert int(limits["Max file size"]) == 256 << 30
    assert int(limits["Max open files"]) <= 65536
    assert (limits["Max processes"] == "16384") is (os.geteuid() == 0)


async def test_an_engine_knows_its_users_name_without_a_user_database(bench: Bench) -> None:
    ask = "import getpass, os, tempfile; print(getpass.getuser(), os.path.expanduser('~'), tempfile.gettempdir())"
    record = await bench.run(PreparedEngine("p", sys.executable, ("-I", "-S", "-c", ask)))
    assert record.code == 0, bench.log()
    _, home, temporary = bench.log().decode().split()
    assert home == f"{bench.root}/work/p"
    assert temporary.startswith(f"{home}/tmp.")


@pytest.mark.usefixtures("as_root")
async def test_uids_that_a_user_or_another_pool_has_are_passed_over(bench: Bench) -> None:
    known = pwd.getpwnam("daemon").pw_uid
    options = LaunchOptions(UserRules(uids=(known, known + 1)))
    if any(known + 1 in (entry.pw_uid, entry.pw_gid) for entry in pwd.getpwall()):
        options = LaunchOptions(UserRules(uids=(61184, 61185)))
    first = await bench.launch(sh("exec sleep 60"), options=options)
    assert "user:daemon" not in first.isolation
    assert "user:nobody" not in first.isolation


@pytest.mark.usefixtures("as_root")
async def test_without_any_uid_to_be_had_engines_share_nobody_and_it_is_said(bench: Bench) -> None:
    known = pwd.getpwnam("daemon").pw_uid
    process = await bench.launch(sh("exec sleep 60"), options=LaunchOptions(UserRules(uids=(known, known))))
    assert process.isolation == "user:nobody,no_new_privs,no_caps"
    assert "share the user 'nobody'" in (process.notice or "")


@pytest.mark.usefixtures("as_root")
async def test_an_engine_cannot_read_or_forge_its_record(bench: Bench) -> None:
    record = await bench.run(
        sh(f"cat {bench.root}/shims/* && exit 1; echo x > {bench.root}/shims/x && exit 2; exit 0"), options=HOME
    )
    assert record.code == 0


@pytest.mark.usefixtures("as_root")
async def test_the_engine_user_can_be_chosen(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"), options=LaunchOptions(UserRules(user="daemon")))
    assert process.isolation == "user:daemon,no_new_privs,no_caps"


@pytest.mark.usefixtures("as_root")
async def test_an_unknown_engine_user_is_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match="there is no such user") as caught:
        await bench.launch(sh("exit 0"), options=LaunchOptions(UserRules(user="nosuchuser")))
    assert caught.value.hint


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("profile", ["home", "cloud", "dev"])
async def test_a_binary_out_of_reach_is_refused_with_the_path_that_closes_the_way(bench: Bench, root: Path, profile: str) -> None:
    binary = private_binary(root)
    with pytest.raises(EngineError, match="preload failed: cannot run") as caught:
        await bench.launch(PreparedEngine("p", str(binary)), options=LaunchOptions(profile=profile))  # type: ignore[arg-type]
    assert f"{root}/private may not be entered by user '6" in caught.value.message
    hint = caught.value.hint or ""
    assert all(remedy in hint for remedy in ("/opt or /srv", f"open {root}/private", "daemon.engine_user: root"))


@pytest.mark.usefixtures("as_root")
async def test_only_a_written_root_runs_a_configured_engine_as_root_and_that_is_no_isolation(bench: Bench, root: Path) -> None:
    binary = private_binary(root)
    options = LaunchOptions(UserRules(user="root"), profile="dev")
    process = await bench.launch(PreparedEngine("p", str(binary), ("60",)), options=options)
    status = procfs.status(process.pid) or {}
    assert status["Uid"].split() == ["0"] * 4
    assert status["NoNewPrivs"] == "1"
    assert status | NO_CAPABILITIES == status
    assert process.isolation == "none"
    assert "not isolated" in (process.notice or "")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("way", ["binary", "link", "script", "mode", "fifo"])
@pytest.mark.parametrize("user", [None, "root"])
async def test_what_a_caller_submitted_never_runs_as_root(bench: Bench, root: Path, way: str, user: str | None) -> None:
    binary = private_binary(root)
    target, told = binary, f"{root}/private may not be entered"
    if way == "link":
        target = root / "link"
        target.symlink_to(binary)
    elif way in ("script", "mode"):
        target, told = root / "script", f"{root}/script may not be executed"
        target.write_text("#!/root/SECRET\n")
        target.chmod(0o700)
    elif way == "fifo":
        target, told = root / "fifo", "it is no regular file"
        os.mkfifo(target, 0o777)
        target.chmod(0o777)
    options = LaunchOptions(UserRules(user=user), profile="dev")
    with pytest.raises(EngineError, match="cannot run") as caught:
        await bench.launch(PreparedEngine("p", str(target), ("60",), verbatim=True), options=options)
    assert told in caught.value.message
    assert "SECRET" not in caught.value.message
    assert "engine_user" not in (caught.value.hint or ""), "it would not help"
    process = await bench.launch(sh("exec sleep 60", verbatim=True), options=options)
    assert procfs.uids(process.pid).isdisjoint({0})


@pytest.mark.usefixtures("as_root")
async def test_a_submitter_is_not_told_what_is_in_closed_folders(bench: Bench, root: Path) -> None:
    private_binary(root)
    said = set()
    for name in ("engine", "missing"):
        with pytest.raises(EngineError) as caught:
            await bench.launch(PreparedEngine("p", str(root / "private" / name), verbatim=True), options=HOME)
        said.add(caught.value.message.replace(name, "NAME"))
    assert len(said) == 1


@pytest.mark.usefixtures("as_root")
async def test_cloud_refuses_an_engine_that_nothing_would_separate_from_the_daemon(bench: Bench) -> None:
    with pytest.raises(EngineError, match="nothing would separate it from the daemon") as caught:
        await bench.launch(sh("exit 0"), options=LaunchOptions(UserRules(user="root"), profile="cloud"))
    assert caught.value.code == "ISOLATION_REQUIRED"


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("place", ["model", "flag"])
async def test_a_model_that_the_user_may_not_read_is_named(bench: Bench, root: Path, place: str) -> None:
    model = root / "m.gguf"
    model.write_bytes(b"GGUF")
    model.chmod(0o600)
    engine = sh("exit 0", model_path=str(model)) if place == "model" else PreparedEngine("p", "/bin/sh", ("-m", str(model)))
    with pytest.raises(EngineError, match=r"m\.gguf may not be read by user '6\d+'"):
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
from pool_managerd.runtime.engine_users import UserRules
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.spawner import Spawner

async def main(root, python):
    spawner = Spawner(python)
    launcher = Launcher(spawner, RuntimeFiles(root), LaunchOptions(UserRules(user="root"), profile="home"))
    process = await launcher.launch(PreparedEngine("p", "/bin/sleep", ("60",)), epoch=1, grace_ms=1000)
    adjusted = Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip()
    print(process.isolation, process.notice, os.stat(root / "work" / "p").st_uid, adjusted, sep="|")
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
    isolation, notice, owner, adjusted = first.split("|")
    assert (isolation, owner) == ("none", "65534")
    assert adjusted == "500", "a shim that cannot be traced still lets its engine choose to be ended first"
    assert "not isolated from the daemon: both run as user 'nobody'" in notice
    assert second == "15|True"


def test_what_is_read_back_is_what_the_kernel_says() -> None:
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    assert read_back(ended.pid) == "unknown"
    assert read_back(os.getpid()) == "none", "who shares our uid is not isolated, whatever else holds"


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
    made = engine_environment(inherited, {"PATH": "/own"}, Places("/w", "/w/tmp.1", "/c", "61190"), "n")
    assert made == {
        "PATH": "/own",
        "LC_ALL": "C",
        "CUDA_CACHE_PATH": "/c",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "HOME": "/w",
        "XDG_CACHE_HOME": "/c",
        "TORCHINDUCTOR_CACHE_DIR": "/c/torchinductor",
        "USER": "61190",
        "LOGNAME": "61190",
        "TMPDIR": "/w/tmp.1",
        "SPT_NOENV": "1",
        "POOL_MANAGERD_NONCE": "n",
    }
