"""Certificates that follow from a secret, and what a TLS connection makes of them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from mlplatform_ops.certificates import Certificates, certificates_of

OURS = certificates_of("p" + "a" * 43, name="dask")


def context(side: int, shown: Certificates, trusted: Certificates, folder: Path) -> ssl.SSLContext:
    """Ask for a certificate and show one, as Dask does; as strictly as Python 3.13 and later do by themselves."""
    made = ssl.SSLContext(side)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=trusted.authority)
    (folder / "certificate").write_text(shown.certificate)
    (folder / "key").write_text(shown.key)
    made.load_cert_chain(folder / "certificate", folder / "key")
    return made


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Let two sides greet each other without a network."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_the_same_secret_gives_the_same_certificates_and_another_one_others() -> None:
    assert certificates_of("p" + "a" * 43, name="dask") == OURS
    others = certificates_of("p" + "b" * 43, name="dask")
    assert not set(others) & set(OURS)
    assert not set(certificates_of("p" + "a" * 43, name="other")) & set(OURS)


def test_the_authoritys_key_is_nowhere() -> None:
    assert "PRIVATE KEY" in OURS.key
    assert "PRIVATE KEY" not in OURS.authority + OURS.certificate


def test_two_sides_with_certificates_of_one_secret_accept_each_other(tmp_path: Path) -> None:
    shake_hands(
        context(ssl.PROTOCOL_TLS_CLIENT, OURS, OURS, tmp_path), context(ssl.PROTOCOL_TLS_SERVER, OURS, OURS, tmp_path)
    )


def test_a_side_with_certificates_of_another_secret_is_refused(tmp_path: Path) -> None:
    others = certificates_of("p" + "b" * 43, name="dask")
    server = context(ssl.PROTOCOL_TLS_SERVER, OURS, OURS, tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context(ssl.PROTOCOL_TLS_CLIENT, others, OURS, tmp_path), server)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context(ssl.PROTOCOL_TLS_CLIENT, OURS, others, tmp_path), server)
