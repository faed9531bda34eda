"""Certificates of an authority of our own, by which parts of the platform know each other."""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# What a secret makes has to be the same whenever it is made: it ends when the secret is replaced, not by the calendar.
_BEGIN, _END = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)


class Certificates(NamedTuple):
    """An authority's certificate, and a certificate of it with its key, as PEM."""

    authority: str
    certificate: str
    key: str


def issue(
    authority: EllipticCurvePrivateKey | Ed25519PrivateKey,
    own: EllipticCurvePrivateKey | Ed25519PrivateKey,
    *,
    issuer: str,
    subject: str,
    begin: datetime,
    end: datetime,
    hosts: x509.SubjectAlternativeName | None = None,
) -> Certificates:
    """Sign an authority's certificate and one that it vouches for.

    Args:
        authority: The authority's key.
        own: The key of whom it vouches for.
        issuer: The authority's name.
        subject: The other's name.
        begin: From when both are valid.
        end: Until when.
        hosts: Where the other listens; none where nobody asks.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import NameOID

    # Ed25519 has a hash of its own.
    algorithm = None if isinstance(authority, Ed25519PrivateKey) else hashes.SHA256()

    def certificate(
        name: str, key: EllipticCurvePrivateKey | Ed25519PrivateKey, *extensions: tuple[x509.ExtensionType, bool]
    ) -> str:
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(int.from_bytes(identifier.digest[:16], "big"))
            .not_valid_before(begin)
            .not_valid_after(end)
        )
        # Python 3.13 and later ask for both identifiers, and for an authority's usage.
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        for extension, critical in ((identifier, False), (signer, False), *extensions):
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority, algorithm).public_bytes(serialization.Encoding.PEM).decode()

    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signs = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    usage = x509.KeyUsage(**signs, key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False)
    root = (x509.BasicConstraints(ca=True, path_length=0), True), (usage, True)
    named = [(hosts, False)] if hosts else []
    return Certificates(certificate(issuer, authority, *root), certificate(subject, own, *named), key.decode())


def certificates_of(secret: str, *, name: str) -> Certificates:
    """Make certificates that follow from a secret: the same ones each time, and others from any other secret.

    Args:
        secret: A random value of 32 bytes or more. Whoever knows it can make certificates that are accepted; servers
            and clients get what follows from it, and not the secret.
        name: Whose certificates they are.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    authority, own = (
        Ed25519PrivateKey.from_private_bytes(hmac.digest(secret.encode(), f"{name} {part}".encode(), hashlib.sha256))
        for part in ("authority", "certificate")
    )
    return issue(authority, own, issuer=f"{name} authority", subject=name, begin=_BEGIN, end=_END)
