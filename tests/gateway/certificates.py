"""Certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pool_managerd.gateway.certificate import CertificateFiles

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def _openssl(*arguments: str) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True, timeout=30)


def certify(folder: Path, name: str = "gateway") -> CertificateFiles:
    """A certificate for 127.0.0.1 that has signed itself, and its key; they take the place of those before at once."""
    folder.mkdir(exist_ok=True)
    files = CertificateFiles(folder / f"{name}.crt", folder / f"{name}.key")
    new = folder / "new.crt", folder / "new.key"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    _openssl("req", "-x509", *_KEY, "-nodes", *subject, "-keyout", str(new[1]), "-out", str(new[0]))
    new[1].chmod(0o600)
    new[0].rename(files.cert)
    new[1].rename(files.key)
    return files


def expire(files: CertificateFiles) -> None:
    """Its certificate has expired."""
    asked = files.cert.with_suffix(".csr")
    _openssl("req", "-new", "-key", str(files.key), "-subj", "/CN=localhost", "-out", str(asked))
    _openssl("x509", "-req", "-in", str(asked), "-signkey", str(files.key), "-days", "-1", "-out", str(files.cert))


def sign(files: CertificateFiles, by: CertificateFiles) -> None:
    """Its certificate is one that ``by`` has signed, with that behind it."""
    asked = files.cert.with_suffix(".csr")
    _openssl("req", "-new", "-key", str(files.key), "-subj", "/CN=elsewhere", "-out", str(asked))
    signed = ("-CA", str(by.cert), "-CAkey", str(by.key), "-CAcreateserial", "-days", "2")
    _openssl("x509", "-req", "-in", str(asked), *signed, "-out", str(files.cert))
    files.cert.write_bytes(files.cert.read_bytes() + by.cert.read_bytes())


def lock(files: CertificateFiles) -> None:
    """Its key has a passphrase."""
    locked = files.key.with_suffix(".locked")
    _openssl("pkey", "-in", str(files.key), "-aes128", "-passout", "pass:secret", "-out", str(locked))
    locked.rename(files.key)
