"""A process that is killed before any of its file operations: each of them once, with everything before it done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

OPERATIONS = ("open", "write", "pwrite", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir")


class KilledError(BaseException):
    """Nothing handles it, as nothing handles SIGKILL; what Python closes on the way, the kernel would."""


def killed_at_each(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], Callable[[], object]]) -> Iterator[int]:
    """Yields after each kill, until the work has come to its end. ``work`` makes what is to be done, anew for each number; a
    write that is killed has written half of what it should.
    """
    number = 0
    while True:
        run = work(number)
        left = [number]
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, _counting(getattr(os, name), name, left))
            try:
                run()
            except KilledError:
                pass
            else:
                assert number > 3, "nothing was killed"
                return
        yield number
        number += 1


def _counting(real: Callable[..., object], name: str, left: list[int]) -> Callable[..., object]:
    def operation(*args: object, **more: object) -> object:
        if left[0] == 0:
            if name in ("write", "pwrite"):
                data = args[1]
                assert isinstance(data, bytes | memoryview)
                real(args[0], data[: len(data) // 2], *args[2:], **more)
            raise KilledError(name)
        left[0] -= 1
        return real(*args, **more)

    return operation
