"""The crash reports that are kept: bounded in memory, and in the journal for the next daemon."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress

from pool_managerd.core.crash_report import CrashReport
from pool_managerd.supervision.protocols import Journal

MAX_OF_A_POOL = 20
MAX_REPORTS = 500


class CrashLog:
    """Reports of all pools, oldest first: the newest 20 of a pool, 500 in all. Nothing waits for the ``journal``."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._kept: dict[str, CrashReport] = {}
        self._last: dict[str, CrashReport] = {}

    def restore(self) -> None:
        """Take up what earlier daemons left; after the journal was opened."""
        for body in self._journal.recall_crashes() if self._journal is not None else ():
            with suppress(ValueError):  # a newer version's, or not ours
                report = CrashReport.from_json(body)
                self._keep(report)
        self._bound()

    def put(self, report: CrashReport) -> CrashReport:
        """Keep ``report`` as it is now, in the place of what was known of the same crash; as it is kept."""
        report = report.bounded()
        self._keep(report)
        if self._journal is not None:
            self._journal.put_crash(report.crash_id, report.to_json())
        self._bound(report.pool_id)
        return report

    def _keep(self, report: CrashReport) -> None:
        self._kept[report.crash_id] = report
        if not report.candidate:
            self._last[report.pool_id] = report

    def recent(self, pool_id: str | None = None) -> list[CrashReport]:
        """Those that are kept, of all pools or of one, newest last."""
        return [report for report in self._kept.values() if pool_id in (None, report.pool_id)]

    def last(self, pool_id: str) -> CrashReport | None:
        """The newest of a pool, without those of engines that were only tried."""
        return self._last.get(pool_id)

    def forget(self, pool_id: str) -> None:
        """The pool is forgotten."""
        self._last.pop(pool_id, None)
        for report in self.recent(pool_id):
            self._drop(report)

    def forget_others(self, pool_ids: Set[str]) -> None:
        """Forget every pool that is not among ``pool_ids``."""
        for pool_id in {report.pool_id for report in self._kept.values()} - pool_ids:
            self.forget(pool_id)

    def _bound(self, pool_id: str | None = None) -> None:
        pools = {report.pool_id for report in self._kept.values()} if pool_id is None else {pool_id}
        for name in pools:
            for report in self.recent(name)[:-MAX_OF_A_POOL]:
                self._drop(report)
        for report in self.recent()[:-MAX_REPORTS]:
            self._drop(report)

    def _drop(self, report: CrashReport) -> None:
        del self._kept[report.crash_id]
        if self._journal is not None:
            self._journal.put_crash(report.crash_id, None)
