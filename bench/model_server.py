"""A web server of one folder over TLS, as fast as Python can: ``python -m bench.model_server FOLDER CERT KEY``.

It says its port, then a line for each answer: the first byte that was asked for, and how many were sent.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
import threading
from pathlib import Path

_PIECE_BYTES = 1 << 20


def main(folder: str, cert: str, key: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        say(listening.getsockname()[1])
        while True:
            client, _ = listening.accept()
            threading.Thread(target=_serve, args=(context, client, Path(folder)), daemon=True).start()


def _serve(context: ssl.SSLContext, client: socket.socket, folder: Path) -> None:
    try:
        with context.wrap_socket(client, server_side=True) as secure, secure.makefile("rb") as asked:
            while _answer(secure, head := _head(asked), folder) and head:
                pass
    except OSError:
        pass


def _head(asked: object) -> str:
    lines = iter(lambda: asked.readline().decode("latin-1"), "\r\n")  # type: ignore[attr-defined]
    return "".join(line for line, _ in zip(lines, range(100), strict=False) if line)


def _answer(secure: ssl.SSLSocket, head: str, folder: Path) -> bool:
    """Whether the connection goes on."""
    if not head:
        return False
    wanted = re.search(r"^range: bytes=(\d+)-(\d*)\r$", head, re.IGNORECASE | re.MULTILINE)
    path = folder / Path(head.split()[1]).name
    size = path.stat().st_size
    first, last = (int(wanted[1]), int(wanted[2] or size - 1)) if wanted else (0, size - 1)
    span = f"206 Partial\r\nContent-Range: bytes {first}-{last}/{size}" if wanted else "200 OK"
    secure.sendall(f'HTTP/1.1 {span}\r\nETag: "1"\r\nContent-Length: {last + 1 - first}\r\n\r\n'.encode())
    sent = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            while sent <= last - first:
                piece = file.read(min(_PIECE_BYTES, last + 1 - first - sent))
                secure.sendall(piece)
                sent += len(piece)
    finally:
        say(f"{first} {sent}")
    return True


def say(text: object) -> None:
    os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
