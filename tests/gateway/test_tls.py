"""The gateway behind a certificate: what it takes to use one, and to change it while streams go on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from pydantic import ValidationError

from pool_managerd import PoolManager, open_gateway
from pool_managerd.cli.exits import CommandFailed
from pool_managerd.cli.gateway_client import find_gateway
from pool_managerd.config.gateway import GatewayConfig
from pool_managerd.errors import SpecError
from pool_managerd.gateway.certificate import Certificate, CertificateFiles, trusting
from pool_managerd.gateway.process import check
from pool_managerd.httpd.guard import Connections, GuardedConnection
from tests.gateway.certificates import certify, expire, lock, sign
from tests.gateway.lab import CHUNK, OPTIONS, Lab, lab
from tests.system.nodes import config

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}


@asynccontextmanager
async def trusted(files: CertificateFiles) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting(files.cert))) as session:
        yield session


@asynccontextmanager
async def secured(files: CertificateFiles, **http: Any) -> AsyncIterator[tuple[Lab, Certificate]]:
    certificate = Certificate(files)
    options = dataclasses.replace(OPTIONS, certificate=certificate, http=dataclasses.replace(OPTIONS.http, **http))
    async with lab(options) as one:
        yield one, certificate


async def shown(one: Lab, files: CertificateFiles) -> bytes | None:
    """The certificate that a new connection is shown; it is one that ``files`` trust."""
    at = urlsplit(one.url)
    _, writer = await asyncio.open_connection(at.hostname, at.port, ssl=trusting(files.cert))
    found: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def test_clients_come_by_https_alone(tmp_path: Path) -> None:
    files = certify(tmp_path)
    async with secured(files) as (one, certificate), trusted(files) as session:
        assert one.url.startswith("https://") and certificate.context.minimum_version is ssl.TLSVersion.TLSv1_2
        async with session.post(f"{one.url}/v1/chat/completions", json=STREAM) as answer:
            assert (await answer.read()).startswith(CHUNK)
        one.node.logs["m"] = ["loading\n"]
        async with session.get(f"{one.url}/logs/stream/m") as answer:
            assert await answer.content.readline() == b"loading\n", "who is at the other end is known here, too"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await one.ask(CHAT)
        with pytest.raises(aiohttp.ClientError):
            await one.session.get(one.url.replace("https", "http") + "/health")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda files: files.cert.unlink(), "tls_cert .*gateway.crt: No such file"),
        (lambda files: files.key.unlink(), "tls_key .*gateway.key: No such file"),
        (lambda files: files.key.chmod(0o644), "tls_key .*: other users may read it"),
        (lambda files: files.cert.chmod(0o666), "tls_cert .*: other users may write to it"),
        (lambda files: files.cert.write_text("nonsense"), "tls_cert .*: it is no certificate in PEM"),
        (lambda files: files.cert.write_bytes(files.key.read_bytes()), "tls_cert .*: it is no certificate in PEM"),
        (lambda files: files.key.write_text("nonsense"), "tls_key .*: it is no private key in PEM"),
        (lambda files: files.key.write_bytes(b"x" * (1 << 20) + b"y"), "tls_key .*: it is larger than 1 MiB"),
        (lambda files: certify(files.key.parent, "other").key.rename(files.key), "tls_key .*: it is not the key of .*crt"),
        (expire, "tls_cert .*: it has expired"),
        (lock, "tls_key .*: it has a passphrase"),
    ],
)
async def test_what_cannot_be_used_is_named_with_why(
    tmp_path: Path, open_dir: Path, spoil: Callable[[CertificateFiles], object], why: str
) -> None:
    files = certify(tmp_path)
    written = config(open_dir).model_copy(update={"gateway": GatewayConfig(tls_cert=files.cert, tls_key=files.key)})
    check(written, "127.0.0.1:0")
    spoil(files)
    with pytest.raises(SpecError, match=f"^cannot use gateway.{why}"):
        check(written, "127.0.0.1:0")


async def test_a_certificate_that_others_have_signed_is_known_by_itself_alone(tmp_path: Path) -> None:
    files, other, root = certify(tmp_path / "a"), certify(tmp_path / "b"), certify(tmp_path, "root")
    for each in (files, other):
        sign(each, root)
        each.key.chmod(0o640)
    async with secured(files) as (one, _):
        assert await shown(one, files)
        with pytest.raises(ssl.SSLCertVerificationError):
            await shown(one, other)


def test_a_certificate_comes_with_its_key() -> None:
    for given in ({"tls_cert": "a"}, {"tls_key": "a"}):
        with pytest.raises(ValidationError, match="belong together"):
            GatewayConfig.model_validate(given)


async def test_a_new_certificate_is_used_for_new_connections_and_drops_none(tmp_path: Path) -> None:
    files = certify(tmp_path)
    async with secured(files) as (one, certificate), trusted(files) as session:
        before = await shown(one, files)
        one.engine.step = asyncio.Semaphore(1)
        async with session.post(f"{one.url}/v1/chat/completions", json=STREAM) as answer:
            assert await answer.content.readexactly(len(CHUNK)) == CHUNK
            certify(tmp_path)
            certificate._looked_at = 0.0
            after = await shown(one, files)
            assert after != before and after is not None
            for _ in range(2):
                one.engine.step.release()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n"), "what was open goes on"


async def test_one_that_cannot_be_used_leaves_that_before_in_force(tmp_path: Path) -> None:
    files = certify(tmp_path)
    trust = CertificateFiles(tmp_path / "trust.crt", files.key)
    trust.cert.write_bytes(files.cert.read_bytes())
    async with secured(files) as (one, certificate):
        before = await shown(one, trust)
        for spoil in (lambda: files.key.write_text("half"), files.cert.unlink):
            spoil()
            certificate._looked_at = 0.0
            assert await shown(one, trust) == before
        certify(tmp_path)
        certificate._looked_at = 0.0
        assert await shown(one, files) != before


async def test_a_slow_reader_is_served_and_one_that_takes_next_to_nothing_is_cut_off(tmp_path: Path) -> None:
    files = certify(tmp_path)
    async with secured(files, write_timeout_s=1.5, head_timeout_s=3.0) as (one, _):
        one.engine.words = 200_000
        body, at = json.dumps(STREAM).encode(), urlsplit(one.url)
        readers = []
        for _ in range(2):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (at.hostname, at.port))
            reader, writer = await asyncio.open_connection(
                sock=connection, ssl=trusting(files.cert), server_hostname="localhost", limit=4096
            )
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            readers.append((reader, writer))
        (slow, slows), (_, silents) = readers
        await one.until(lambda: one.gateway.leasing.used() == 2, "both to run")
        began = time.monotonic()
        while one.gateway.leasing.used() == 2 or time.monotonic() - began < 3:  # the silent one goes, the slow one reads on
            assert await slow.read(4096)
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < 20
        assert one.gateway.leasing.used() == 1
        for writer in (slows, silents):
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


class Buffered(asyncio.Transport):
    """Has so many bytes to send."""

    def __init__(self, size: int, under: Buffered | None = None) -> None:
        super().__init__()
        self._size, self._ssl_protocol, self.limits = size, SimpleNamespace(_transport=under), (1, 2)

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.limits

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = (low or 0, high or 0)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            raise OSError("closed")
        return default


async def test_what_was_not_sent_is_counted_below_tls_too_and_bounded_as_without() -> None:
    connection = GuardedConnection(Connections(asyncio.Protocol, 1, 1.0, 1.0), asyncio.Protocol)
    above = Buffered(3, Buffered(5))
    above.limits = (100, 200)
    connection.connection_made(above)
    assert connection.unsent() == 8 and above.limits == (1, 2)
    plain = GuardedConnection(Connections(asyncio.Protocol, 1, 1.0, 1.0), asyncio.Protocol)
    plain.connection_made(Buffered(3))
    assert plain.unsent() == 3


async def test_commands_trust_a_ca_file_and_the_configured_certificate(tmp_path: Path) -> None:
    files = certify(tmp_path)
    async with secured(files) as (one, _):

        def models(**where: Path) -> list[str]:
            url = None if "config" in where else one.url
            client = find_gateway(url, where.get("config"), where.get("ca_file"))
            return [row["id"] for row in client.call("GET", "models")["data"]]

        assert await asyncio.to_thread(models, ca_file=files.cert) == ["m"]
        with pytest.raises(CommandFailed, match="CERTIFICATE_VERIFY_FAILED") as refused:
            await asyncio.to_thread(models)
        assert "--ca-file" in str(refused.value.hint)
        written = tmp_path / "pool-managerd.yaml"
        gateway = {"bind": urlsplit(one.url).netloc, "tls_cert": "gateway.crt", "tls_key": "gateway.key"}
        written.write_text(json.dumps({"profile": "dev", "gateway": gateway}))
        assert await asyncio.to_thread(models, config=written) == ["m"]
        certify(tmp_path)
        with pytest.raises(CommandFailed, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(models, config=written)
        for unusable in (tmp_path / "none.pem", files.key):
            with pytest.raises(CommandFailed, match="cannot use --ca-file"):
                await asyncio.to_thread(models, ca_file=unusable)


async def test_an_embedded_gateway_has_it_too(tmp_path: Path, open_dir: Path) -> None:
    files = certify(tmp_path)
    written = config(open_dir).model_copy(update={"gateway": GatewayConfig(tls_cert=files.cert, tls_key=files.key)})
    async with (
        PoolManager(written) as node, open_gateway(node, "127.0.0.1:0") as url, trusted(files) as session,
        session.get(f"{url}/health") as answer,
    ):  # fmt: skip
        assert url.startswith("https://") and answer.status == 200
