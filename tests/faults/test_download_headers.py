"""Answers that are made to do harm, to each fetcher: an error that says so, and nothing wrong in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.download_checks import holding_nothing_more, nothing_but_right, nothing_is_told, whole
from tests.faults.download_proxy import answering, reset_after
from tests.faults.download_sources import KINDS, SECRET, Tls, source

ALWAYS, AT = 99, 150_000
_CHALLENGE = 'HTTP/1.1 401 No\nWWW-Authenticate: Bearer realm="AT"\nContent-Length: 0'
HOSTILE = {
    "no answer at all": "",
    "another protocol": "SSH-2.0-OpenSSH_9",
    "a range that was not asked for": "HTTP/1.1 206 Partial\nContent-Range: bytes 7-9/{size}\nContent-Length: 3",
    "a range of nothing known": "HTTP/1.1 206 Partial\nContent-Range: bytes */*\nContent-Length: 3",
    "a range that is no number": "HTTP/1.1 206 Partial\nContent-Range: bytes 0-²/" + "9" * 5000 + "\nContent-Length: 3",
    "a length below zero": "HTTP/1.1 200 OK\nContent-Length: -1",
    "a length without end": "HTTP/1.1 200 OK\nContent-Length: " + "9" * 5000,
    "two lengths": "HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 5",
    "a length and chunks": "HTTP/1.1 200 OK\nContent-Length: 3\nTransfer-Encoding: chunked",
    "chunks that are none": "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n-5",
    "a chunk without end": "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n" + "f" * 30,
    "more than it may be": "HTTP/1.1 200 OK\nContent-Length: 1125899906842624",
    "ten thousand headers": "HTTP/1.1 200 OK\n" + "\n".join(f"X-{n}: {n}" for n in range(10_000)),
    "a header of a megabyte": "HTTP/1.1 200 OK\nETag: " + "e" * 1_000_000,
    "a redirect of a megabyte": "HTTP/1.1 302 Found\nLocation: https://127.0.0.1/" + "a" * 1_000_000,
    "a redirect to nowhere": "HTTP/1.1 302 Found",
    "a redirect that is none": "HTTP/1.1 302 Found\nLocation: https://127.0.0.1:99999999/",
    "a redirect to a port that is none": "HTTP/1.1 302 Found\nLocation: https://127.0.0.1:-1/",
    "a redirect to a name that is too long": f"HTTP/1.1 302 Found\nLocation: https://{'a' * 70}.0.0.1/",
    "a redirect to an empty name": "HTTP/1.1 302 Found\nLocation: https://..0.0.1/",
    "a redirect to what cannot be read": "HTTP/1.1 302 Found\nLocation: https://127.0.0.1/\x00\xff%",
    "a redirect to a zone": "HTTP/1.1 302 Found\nLocation: https://[fe80::1%25lo]/",
    "a status that is none": "HTTP/1.1 999 Odd\nContent-Length: 0",
    "a status that is no answer": "\n\n".join(["HTTP/1.1 103 Early"] * 200),
    "what is compressed": "HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: 3",
    "what is encoded in a way of its own": "HTTP/1.1 200 OK\nTransfer-Encoding: gzip",
    "a challenge without end": 'HTTP/1.1 401 No\nWWW-Authenticate: Bearer realm="' + 'a",b="' * 1_000 + '"\nContent-Length: 0',
    "a challenge that leads to no port": _CHALLENGE.replace("AT", "https://127.0.0.1:99999999/"),
    "a challenge that leads elsewhere": _CHALLENGE.replace("AT", f"http://10.0.0.1/?{SECRET}"),
}  # fmt: skip


def hostile_cells() -> list[Any]:
    return [
        pytest.param(kind, name, id=f"{kind}-{name}", marks=() if kind == "hf" else pytest.mark.slow)
        for kind in KINDS for name in HOSTILE
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), hostile_cells())
async def test_headers_that_do_harm_are_an_error_or_tried_again_and_bring_nothing_wrong(
    kind: str, name: str, tls: Tls, tmp_path: Path
) -> None:
    async with source(kind, tls) as s, holding_nothing_more(), s.fetching(tmp_path, tries=2, stall_s=1) as f:
        answer = answering(HOSTILE[name].replace("{size}", str(len(s.body))), b"abc")
        for faults in ([answer] * ALWAYS, [reset_after(AT), *[answer] * ALWAYS]):
            s.proxy.faults = list(faults)
            problem = await f.refusal(s.ref, s.digest)
            assert problem.message.startswith("cannot ") and len(problem.message) < 1_500, len(problem.message)
            nothing_is_told(problem)
            nothing_but_right(s, f.cache.root)
            assert f.cache.find(s.ref) is None
        s.proxy.faults = []
        await whole(s, f)
