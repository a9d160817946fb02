"""The gateway's certificate and its key: checked before they are used, and used anew when their files have changed."""

from __future__ import annotations

import os
import re
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from pool_managerd.config import Config, path_from
from pool_managerd.errors import SpecError

log = structlog.get_logger("pool_managerd.gateway")
_LOOK_S = 1.0
_MAX_BYTES = 1 << 20
_ROUNDS = 8
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
_NOT_YET, _EXPIRED = 9, 10
"""OpenSSL's numbers for certificates that do not hold now."""
_Seen = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """In PEM; ``cert`` with those that lead to its root behind it."""

    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """For a server. Raises SpecError that names the file which cannot be used, and why."""
        self._check_readable()
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.set_alpn_protocols(["http/1.1"])
        anchor = self._as_anchor()
        try:
            made.load_cert_chain(self.cert, self.key, password=self._refuse_passphrase)
        except ssl.SSLError as problem:
            if problem.reason == "KEY_VALUES_MISMATCH":
                raise _unusable("key", self.key, f"it is not the key of {self.cert}") from None
            raise _unusable("key", self.key, "it is no private key in PEM") from None
        self._check_holds(made, anchor)
        return made

    def seen(self) -> _Seen | None:
        """Other values than before say that a file was changed; None while they cannot be seen."""
        try:
            found = [path.stat() for path in (self.cert, self.key)]
        except OSError:
            return None
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)

    def _check_readable(self) -> None:
        for name, path in (("cert", self.cert), ("key", self.key)):
            try:
                with path.open("rb") as file:
                    size, mode = len(file.read(_MAX_BYTES + 1)), os.fstat(file.fileno()).st_mode
            except OSError as error:
                raise _unusable(name, path, error.strerror or str(error)) from error
            if size > _MAX_BYTES:
                raise _unusable(name, path, f"it is larger than {_MAX_BYTES >> 20} MiB")
            if name == "key" and mode & 0o007:
                raise _unusable(name, path, "other users may read it", hint=f"chmod 640 {path}, and make another key")
            if mode & 0o022:
                raise _unusable(name, path, "other users may write to it", hint=f"chmod go-w {path}")

    def _as_anchor(self) -> ssl.SSLContext:
        """For a client that takes this certificate alone, whoever has signed it."""
        try:
            return trusting(self.cert)
        except ssl.SSLError:
            raise _unusable("cert", self.cert, "it is no certificate in PEM") from None

    def _refuse_passphrase(self) -> str:
        raise _unusable("key", self.key, "it has a passphrase, which nobody is there to type")

    def _check_holds(self, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        """Between now and its end, as a client sees it that trusts it: a handshake in memory shows that."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(_ROUNDS):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLCertVerificationError as problem:
                    if problem.verify_code in (_NOT_YET, _EXPIRED):
                        why = "it has expired" if problem.verify_code == _EXPIRED else "it does not hold yet"
                        raise _unusable("cert", self.cert, why, hint="renew it; the gateway sees a new file by itself") from None
                    return  # of whom clients trust, they decide


class Certificate:
    """``context`` is a server's. While changed files cannot be used, what was read before holds. Raises SpecError."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._seen, self._looked_at = files.seen(), time.monotonic()
        self.context = self._current = files.context()
        self.context.sni_callback = self._begins

    def _begins(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        """A connection: it has the certificate as it is now. Those that are open keep theirs."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._look()
        connection.context = self._current

    def _look(self) -> None:
        seen = self._files.seen()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._current = self._files.context()
            log.info("The gateway has a new certificate", action="certificate")
        except SpecError as problem:
            human = f"The certificate that was read before holds on: {problem.message}"
            log.error(human, action="certificate", hint=problem.hint)


def certificate_files(config: Config) -> CertificateFiles | None:
    """The configured ones; None where it speaks plain HTTP."""
    cert, key = config.gateway.tls_cert, config.gateway.tls_key
    if cert is None or key is None:
        return None
    return CertificateFiles(path_from(config.base_dir, cert), path_from(config.base_dir, key))


def trusting(cert: Path) -> ssl.SSLContext:
    """For a client of the server whose certificate this is: it takes that one alone, under any name. Raises OSError, also for
    what is no certificate.
    """
    first = _PEM.search(cert.read_bytes())
    if first is None:
        raise ssl.SSLError("no certificate in PEM")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    made.load_verify_locations(cadata=first[0].decode("ascii", "replace"))
    return made


def _unusable(name: str, path: Path, why: str, hint: str | None = None) -> SpecError:
    return SpecError(f"cannot use gateway.tls_{name} {path}: {why}", code="CONFIG_ERROR", hint=hint)
