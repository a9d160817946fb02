"""Exit codes of the commands, and the errors that lead to them."""

from __future__ import annotations

OK = 0
NO = 1  # the answer is no: not ready, the operation failed, the check found something
USAGE = 2  # usage or configuration
UNREACHABLE = 3
REFUSED = 4  # the daemon answered with an error


class CommandFailed(Exception):
    """A command ends with ``exit_code``; ``hint`` says what to do. ``code`` is the daemon's error code, if it gave one.

    ``passing``: the same may be answered otherwise later, because the daemon was not reached or says so itself.
    """

    def __init__(
        self, message: str, exit_code: int, *, hint: str | None = None, code: str | None = None, retriable: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.hint = hint
        self.code = code
        self.passing = retriable or exit_code == UNREACHABLE
