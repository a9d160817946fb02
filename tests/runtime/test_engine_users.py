"""Which uids engines get where not all can be had: user namespaces, a root without capabilities, taken numbers."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime.engine_users import EngineUsers, UserRules, check_users, shared_user
from pool_managerd.runtime.files import RuntimeFiles

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
SOURCE = str(Path(__file__).parents[2] / "src")

# What an engine would run as, or why none can.
_ASK = """
import sys
from pathlib import Path
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.errors import PoolError
from pool_managerd.runtime.engine_users import EngineUsers, UserRules, check_users
from pool_managerd.runtime.files import RuntimeFiles
try:
    rules = UserRules(*sys.argv[1:])
    check_users(rules)
    user, notice = EngineUsers(rules, RuntimeFiles(Path("/nonexistent"))).of(PreparedEngine("p", "/bin/true", verbatim=True))
    print(user.uid, notice)
except PoolError as error:
    print(error.message, error.hint)
"""


def ask(*wrap: str, named: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*wrap, sys.executable, "-c", _ASK, *named],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout:
        pytest.skip(f"not here: {done.stderr}")
    return done.stdout


def users(root: Path, **rules: object) -> EngineUsers:
    return EngineUsers(UserRules(**rules), RuntimeFiles(root))  # type: ignore[arg-type]


def uid(users: EngineUsers, pool_id: str) -> int:
    return users.of(PreparedEngine(pool_id, "/bin/true"))[0].uid


def test_a_root_that_may_not_change_users_says_so_before_it_forks() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    said = ask("setpriv", "--bounding-set=-setuid,-kill", "--inh-caps=-setuid,-kill")
    assert "root without CAP_KILL, CAP_SETUID" in said
    assert "daemon.engine_user: root" in said


def test_a_namespace_that_maps_root_alone_has_no_user_to_give() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    said = ask("unshare", "--user", "--map-root-user")
    assert "this user namespace does not map them" in said and "daemon.engine_user: root, which is for configured pools" in said


def test_a_namespace_where_the_advice_was_followed_is_not_given_it_again() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    said = ask("unshare", "--user", "--map-root-user", named=("root",))
    assert "what a request submits is never run as root" in said and "engine_user" not in said


def test_pools_never_share_a_uid_though_they_want_the_same(root: Path) -> None:
    given = users(root, uids=(61184, 61187))
    found = {uid(given, pool) for pool in ("a", "b", "c", "d")}
    assert found == {61184, 61185, 61186, 61187}
    assert given.of(PreparedEngine("e", "/bin/true"))[0].name == "nobody"
    given.forget("b")
    assert uid(given, "e") not in {uid(given, pool) for pool in ("a", "c", "d")}
    assert given.of_probes().name == "nobody", "there is none left for it"


def test_a_uid_is_known_again_by_the_files_of_its_pool(root: Path) -> None:
    before = users(root)
    first = uid(before, "a")
    before_files = RuntimeFiles(root)
    before_files.prepare()
    before_files.workdir("a", 61999, 61999)
    assert first != 61999
    after = users(root)
    assert uid(after, "a") == 61999
    assert uid(users(root, uids=(61999, 61999)), "b") != 61999, "another pool's files are there"
    assert uid(users(root, uids=(62000, 62001)), "a") in (62000, 62001), "the range has moved"


def test_numbers_that_users_groups_or_processes_have_are_passed_over(root: Path) -> None:
    taken = sorted({entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()} - {0})
    for number in [number for number in taken if 0 < number < 60000][:5]:
        assert uid(users(root, uids=(number, number)), "a") == pwd.getpwnam("nobody").pw_uid
    sleeper = subprocess.Popen(["/bin/sleep", "60"], user=61300)
    try:
        assert uid(users(root, uids=(61300, 61301)), "a") == 61301
    finally:
        sleeper.kill()
        sleeper.wait()


def test_groups_of_the_configuration_are_given_and_missing_ones_refused(root: Path) -> None:
    name = grp.getgrgid(1).gr_name
    user, _ = users(root, groups=(name,)).of(PreparedEngine("a", "/bin/true"))
    assert user.to_json() == {"uid": user.uid, "gid": user.uid, "groups": [1]}
    with pytest.raises(EngineError, match="there is no group 'nosuchgroup'"):
        users(root, groups=("nosuchgroup",)).of(PreparedEngine("a", "/bin/true"))


def test_what_is_shared_is_known_before_anything_starts() -> None:
    assert shared_user(UserRules()) is None
    assert shared_user(UserRules(user="root")) == "daemon.engine_user is root"
    with pytest.raises(EngineError, match="no such user"):
        check_users(UserRules(user="nosuchuser"))
