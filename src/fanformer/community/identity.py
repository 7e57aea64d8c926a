"""Who is who in a community run: members' keys, the host's certificate, and the key that signs accepted rounds.

A member has a P-384 key in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` makes it: Flower's nodes take no other.
The host has a certificate of its own making, told from others by its SHA-256, and an Ed25519 key (RFC 8032) for what it
publishes. All of it is the package `cryptography`; nothing here is of our invention.
"""

import datetime
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanformer.errors import CheckpointError, ConfigError, import_extra
from fanformer.files.durable import replace_text

SIGNING_KEY, PUBLIC_KEY = "signing-key.pem", "public-key.pem"
CERTIFICATE, CERTIFICATE_KEY = "certificate.pem", "certificate-key.pem"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a member may be called: its name becomes a file's, and a cell of a page."""
_MAKE_KEY = "make one with `fanformer community key NAME`."
_CERTIFICATE_DAYS = 825
_NOT_FOR = (
    "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
    "decipher_only",
)  # fmt: skip
_EARLIER = datetime.timedelta(days=1)
"""How long before its making a certificate holds: a volunteer's clock may be slow."""


def _primitives(module: str) -> Any:
    return import_extra(f"cryptography.{module}", "a community run", extra="community")


def _serialization() -> Any:
    return _primitives("hazmat.primitives.serialization")


@dataclass(frozen=True)
class PublicMember:
    """A member as the host knows it.

    Attributes:
        name: what its rounds are credited to.
        file: its public key.
        fingerprint: SHA-256 of the key's bytes, in hexadecimal.
    """

    name: str
    file: Path
    fingerprint: str


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else may read, from its first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_name(name: str) -> str:
    """Return a member's name.

    Raises:
        ConfigError: if it has other characters than letters, digits, dot, underscore and dash, or more than 64.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"a member's name must be 1 to 64 letters, digits, `.`, `_` or `-`, got {name!r:.80}: choose another."
        )
    return name


def make_member_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Write NAME.key, which the member keeps to itself, and NAME.pub, which its host gets.

    Args:
        name: of the member.
        folder: where the files go.

    Returns:
        The paths of both.

    Raises:
        ConfigError: if the name is none, or one of the files is there: a key is never replaced.
    """
    private, public = folder / f"{check_name(name)}.key", folder / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise ConfigError(f"{path.absolute()} is there already: a key is never replaced, choose another name.")
    serialization, curves = _serialization(), _primitives("hazmat.primitives.asymmetric.ec")
    key = curves.generate_private_key(curves.SECP384R1())
    plain = serialization.NoEncryption()
    _write_private(private, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, plain))
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    replace_text(public, f"{line.decode()} {name}\n")
    return private, public


def read_member_key(path: Path) -> Any:
    """Return a member's private key.

    Raises:
        ConfigError: if there is none, it has a password, or is of another kind.
    """
    curves = _primitives("hazmat.primitives.asymmetric.ec")
    try:
        key = _serialization().load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"cannot read `--key` {path.absolute()} ({error.strerror}): {_MAKE_KEY}") from error
    except (ValueError, TypeError, _primitives("exceptions").UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"`--key` must be a private key in OpenSSH's format, got {path.absolute()}: {_MAKE_KEY}"
        ) from error
    if not isinstance(key, curves.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"`--key` must be of the curve P-384, got {path.absolute()}, which is another: {_MAKE_KEY}")
    return key


def read_public_members(folder: Path, left_out: Callable[[str], None] | None = None) -> list[PublicMember]:
    """Read who may take part: a file NAME.pub each.

    Args:
        folder: of the files.
        left_out: is told what is wrong with a file, which is left out then; None raises it.

    Raises:
        ConfigError: if the folder is missing; if a file holds no P-384 public key, a name is none, or two have one key.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"`--members` must be a folder of public keys, got {folder.absolute()}: make it, and put there the file "
            "NAME.pub that each member made with `fanformer community key NAME`."
        )
    found: dict[str, PublicMember] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            member = _public_member(path)
            if (known := found.get(member.fingerprint)) is not None:
                raise ConfigError(f"{path.absolute()} holds the key of {known.file.name}: delete one of them.")
        except ConfigError as error:
            if left_out is None:
                raise
            left_out(str(error))
        else:
            found[member.fingerprint] = member
    return list(found.values())


def _public_member(path: Path) -> PublicMember:
    fingerprint = hashlib.sha256(read_public_bytes(path)).hexdigest()
    return PublicMember(check_name(path.stem), path, fingerprint)


def read_public_bytes(path: Path) -> bytes:
    """Return a member's public key as Flower sends it: PEM of its SubjectPublicKeyInfo.

    Raises:
        ConfigError: if the file holds no P-384 public key in OpenSSH's format.
    """
    serialization, curves = _serialization(), _primitives("hazmat.primitives.asymmetric.ec")
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, _primitives("exceptions").UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path.absolute()} must hold a public key in OpenSSH's format ({error}): {_MAKE_KEY}"
        ) from error
    if not isinstance(key, curves.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"{path.absolute()} must hold a key of the curve P-384, got another: {_MAKE_KEY}")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def ensure_host_identity(folder: Path, public: Path, addresses: Sequence[str]) -> None:
    """Make the host's certificate and signing key where they are missing.

    Args:
        folder: for CERTIFICATE, CERTIFICATE_KEY and SIGNING_KEY; made so that nobody else can look into it.
        public: where PUBLIC_KEY goes, for all to read.
        addresses: names and IP addresses that members dial, in the certificate.

    Raises:
        ConfigError: if there is a certificate without one of the addresses.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / SIGNING_KEY).exists():
        _make_signing_key(folder / SIGNING_KEY)
    if not (public / PUBLIC_KEY).exists():
        replace_text(public / PUBLIC_KEY, read_signing_key(folder).public_text())
    if not (folder / CERTIFICATE).exists():
        _make_certificate(folder, addresses)
    missing = set(map(_plain_address, addresses)) - set(certificate_addresses(folder / CERTIFICATE))
    if missing:
        raise ConfigError(
            f"the host's certificate names {', '.join(certificate_addresses(folder / CERTIFICATE))}, got the address "
            f"{min(missing)}: give one of these, or delete {folder / CERTIFICATE} and give members the new invitation."
        )


def _make_signing_key(path: Path) -> None:
    serialization = _serialization()
    key = _primitives("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    _write_private(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


def _make_certificate(folder: Path, addresses: Sequence[str]) -> None:
    """Write a certificate that vouches for itself, and its key.

    It is a root and a server's at once, so that a client needs this one file; what it may sign is bounded to itself.
    """
    serialization, x509 = _serialization(), _primitives("x509")
    curves, hashes = _primitives("hazmat.primitives.asymmetric.ec"), _primitives("hazmat.primitives.hashes")
    key = curves.generate_private_key(curves.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "FANformer community host")])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(_NOT_FOR, False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(one) for one in addresses]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / CERTIFICATE_KEY).unlink(missing_ok=True)  # of a certificate that was deleted
    _write_private(
        folder / CERTIFICATE_KEY,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
    )
    replace_text(folder / CERTIFICATE, made.public_bytes(serialization.Encoding.PEM).decode())


def _general_name(address: str) -> Any:
    x509 = _primitives("x509")
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _plain_address(address: str) -> str:
    """Return an IP address in the spelling that a certificate gives back, anything else as it is."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address


def certificate_addresses(path: Path) -> list[str]:
    """Return the names and addresses that a certificate is for."""
    x509 = _primitives("x509")
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(one.value) for one in names]


def certificate_fingerprint(pem: str) -> str:
    """Return the SHA-256 of a certificate in hexadecimal, of its DER form as browsers show it."""
    certificate = _primitives("x509").load_pem_x509_certificate(pem.encode())
    return certificate.fingerprint(_primitives("hazmat.primitives.hashes").SHA256()).hex()


class SigningKey:
    """The Ed25519 key of a run."""

    def __init__(self, key: Any) -> None:
        self._key = key

    def sign(self, content: bytes) -> str:
        """Return the signature of some bytes, 128 hexadecimal digits."""
        return self._key.sign(content).hex()

    def public_text(self) -> str:
        """Return the public key as PEM."""
        serialization = _serialization()
        return (
            self._key.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )


def read_signing_key(folder: Path) -> SigningKey:
    """Return the key that signs a run's rounds.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = folder / SIGNING_KEY
    try:
        key = _serialization().load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, _primitives("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey):
            return SigningKey(key)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read the signing key {path.absolute()} ({error}): restore it.") from error
    raise CheckpointError(f"{path.absolute()} must hold an Ed25519 key, got another kind: restore the run's own.")


class PublicKey:
    """The public half of a run's key, which checks what the host signed."""

    def __init__(self, text: str, where: str) -> None:
        """Read a key.

        Args:
            text: PEM.
            where: it is from, for the message.

        Raises:
            CheckpointError: if it is no Ed25519 public key.
        """
        self.text = text
        try:
            self._key = _serialization().load_pem_public_key(text.encode())
        except (ValueError, TypeError, _primitives("exceptions").UnsupportedAlgorithm) as error:
            raise CheckpointError(f"{where} must hold an Ed25519 public key, got something else.") from error
        if not isinstance(self._key, _primitives("hazmat.primitives.asymmetric.ed25519").Ed25519PublicKey):
            raise CheckpointError(f"{where} must hold an Ed25519 public key, got another kind.")

    def has_signed(self, content: bytes, signature: str) -> bool:
        """Return whether a signature of these bytes is this key's."""
        try:
            self._key.verify(bytes.fromhex(signature), content)
        except (_primitives("exceptions").InvalidSignature, ValueError):
            return False
        return True


def read_public_key(folder: Path) -> PublicKey:
    """Return the public key of a run.

    Raises:
        CheckpointError: if the folder has none.
    """
    path = folder / PUBLIC_KEY
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"no public key at {path.absolute()}: is {folder} the folder of a community run?"
        ) from error
    return PublicKey(text, str(path.absolute()))
