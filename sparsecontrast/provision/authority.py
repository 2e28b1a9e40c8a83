"""Certificates and keys of a federation, made with the ``cryptography`` package.

One authority signs the server's certificate; sites know its certificate and believe no other. The server
knows sites by ECDSA P-384 keys, which Flower checks by a signed time stamp in every request.
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sparsecontrast.errors import ConfigError

SLACK = timedelta(minutes=5)  # a certificate is valid a little before it was made: clocks differ


@dataclass(frozen=True)
class Authority:
    """Who signs.

    Attributes:
        certificate: self-signed.
        key: P-384.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """What every site is given."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """What nobody is given."""
        return _pem(self.key)


def new_authority(federation: str, days: int, now: datetime | None = None) -> Authority:
    """Make an authority that may sign servers' certificates and no further authority.

    Args:
        federation: for its name.
        days: of validity.
        now: when it begins; None for the present.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{federation} authority")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _certificate(name, name, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Authority(made.sign(key, hashes.SHA384()), key)


def read_authority(certificate: Path, key: Path) -> Authority:
    """Read an authority back.

    Raises:
        ConfigError: a file is missing, or they do not belong together.
    """
    try:
        signer = serialization.load_pem_private_key(key.read_bytes(), password=None)
        own = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key.parent}: no authority: {error}; put ca.crt and ca.key back") from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != own.public_key():
        raise ConfigError(f"{key}: is not the key of {certificate.name}")
    return Authority(own, signer)


def server_pem(authority: Authority, names: Iterable[str], days: int, now: datetime | None = None) -> bytes:
    """Make a server's key and certificate, in one file, so that they can only be replaced together.

    Args:
        authority: that signs.
        names: under which the server is reached, the first one its common name; IP addresses are known
            as such.
        days: of validity, at most those of the authority.
        now: when it begins; None for the present.

    Returns:
        PEM: private key, then certificate.
    """
    names = list(dict.fromkeys(names))
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    issuer = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    signer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)
    latest = authority.certificate.not_valid_after_utc
    made = (
        _certificate(_name(names[0]), authority.certificate.subject, key.public_key(), days, now, latest)
        .add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(signer, critical=False)
    )
    signed = made.sign(authority.key, hashes.SHA384())
    return _pem(key) + signed.public_bytes(serialization.Encoding.PEM)


def site_key(name: str) -> tuple[bytes, bytes]:
    """Make the key pair by which the server knows a site.

    Args:
        name: of the site, the comment of the public key.

    Returns:
        The private and the public key, in OpenSSH's formats, which Flower reads.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public + f" {name}\n".encode()


def public_key(text: str, where: str) -> bytes:
    """Read the public key of a pair that a hospital made itself.

    Raises:
        ConfigError: it is none of ECDSA P-384.
    """
    try:
        key = serialization.load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{where}: no public key in OpenSSH's format ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{where}: must be ECDSA P-384: ssh-keygen -t ecdsa -b 384 -N '' -f node.key")
    return text.strip().encode() + b"\n"


def fingerprint(public: bytes) -> str:
    """Return twelve hex digits of a public key's SHA-256; its comment does not count."""
    return hashlib.sha256(public.split()[1]).hexdigest()[:12]


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = now or datetime.now(UTC)
    end = begin + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - SLACK)
        .not_valid_after(min(end, latest) if latest else end)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
