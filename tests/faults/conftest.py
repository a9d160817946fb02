"""A watched daemon for each row, and the oracle after it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.download_sources import Tls
from tests.faults.watched import Watched, WatchedGpuNode
from tests.gateway.certificates import certify
from tests.gpu.conftest import MakePool, driver_library, fake

__all__ = ["MakePool", "driver_library", "fake"]

Make = Callable[..., Watched]
MakeNode = Callable[..., WatchedGpuNode]
_UNFINISHED = pytest.StashKey[bool]()
ALL = "POOL_MANAGERD_TEST_FAULTS"
"""``all``: the whole campaign, as ``make faults`` has it, which takes about a quarter of an hour."""

IN_EVERY_RUN = (
    "test_A7_killed_around_the_commit_of_a_lease_none_is_given_twice[leases.committed]",
    "test_A9_frozen_and_thawed",
    "test_A15_without_anybody_who_reads_its_output_it_goes_on[2>&1",
    "test_A_killed_in_the_middle_of_a_start_one_engine_comes_of_it_or_none[engine.spawned]",
    "test_B3_a_signal_from_outside_is_recorded_counted_and_survived[SIGSEGV]",
    "test_B5_what_an_engine_forked_is_gone_before_the_next_one_starts[flags0]",
    "test_B7_", "test_B11_", "test_B13_", "test_B19_",
    "test_C1_an_engine_that_never_finishes_its_answer_is_given_up_in_time[hang", "test_C11_refused", "test_D1_",
    "test_D3_a_read_only", "test_D5_killed_at_a_write_nothing_that_was_acknowledged_is_lost[pwrite64]",
    "test_D7_what_a_newer_version_wrote_is_refused_untouched[state.db]", "test_D11_",
    "test_D15_a_link_in_the_place_of_a_state_file_is_not_written_through[state.db]", "test_F3_",
    "test_H5_a_body_that_is_made_to_hurt_is_a_quick_refusal[deep]", "test_H7_", "test_H11_",
    "test_H13_made_up_requests_for_every_route_are_never_answered_with_a_failure[150]", "test_I1_without",
    "test_I11_a_configuration_that_is_a_bomb_is_refused_soon[aliases]",
    "test_J5_a_configuration_that_cannot_be_used_changes_nothing_and_is_told[profile: [",
)  # fmt: skip
"""What ``make test`` runs of the rows: one form of each family's most telling ones, a minute and a half together."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long way round to ``make faults``."""
    if os.environ.get(ALL) == "all" or config.getoption("-k") or config.getoption("-m"):
        return
    rows = Path(__file__).parent
    late = [
        item
        for item in items
        if item.path.parent == rows
        and {"make", "daemon", "make_node"} & set(getattr(item, "fixturenames", ()))
        and (item.get_closest_marker("slow") or not item.name.startswith(IN_EVERY_RUN))
    ]
    late += [item for item in items if item.path.name.startswith("test_download_") and item.get_closest_marker("slow")]
    if late:
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in set(late)]


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """What servers of models show, and what downloads trust."""
    files = certify(tmp_path_factory.mktemp("tls"))
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(files.cert, files.key)
    return Tls(shown, ssl.create_default_context(cafile=str(files.cert)), files.cert)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    if not outcome.get_result().passed:
        item.stash[_UNFINISHED] = True


def _judge(made: list[Watched], request: pytest.FixtureRequest) -> None:
    broken = []
    try:
        if not request.node.stash.get(_UNFINISHED, False):
            broken = [f"{one.folder.name}: {sentence}" for one in made if not one.judged for sentence in one.judge()]
    finally:
        for one in made:
            one.watch.end()
            one.end()
    assert not broken, "the oracle says: " + "; ".join(broken)


@pytest.fixture
def make(open_dir: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """``make(extra configuration, NAME=value …)``: daemons that are judged at the end of the test."""
    made: list[Watched] = []

    def daemon(extra: str = "", *, name: str = "d", **env: str) -> Watched:
        made.append(Watched(open_dir / name, extra, **env))
        return made[-1]

    yield daemon
    _judge(made, request)


@pytest.fixture
def daemon(make: Make) -> Watched:
    """One that runs."""
    return make().start()


@pytest.fixture
def make_node(open_dir: Path, driver_library: Path, request: pytest.FixtureRequest) -> Iterator[MakeNode]:
    """Daemons on simulated GPUs that are judged at the end of the test: ``make_node(topology, *lines, pools=[…])``."""
    made: list[Watched] = []

    def node(text: str, *lines: str, **options: Any) -> WatchedGpuNode:
        one = WatchedGpuNode(open_dir / f"node-{len(made)}", driver_library, text, *lines, **options)
        made.append(one)
        return one

    yield node
    _judge(made, request)
