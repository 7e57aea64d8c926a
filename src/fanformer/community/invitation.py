"""The invitation to a community run: an address that says where its host is, and by what it is known.

https://HOST:PORT/#CERTIFICATE-KEY has the first 128 bits of the SHA-256 of the host's certificate and of the key that
signs its rounds, in hexadecimal. Who has it from somebody they trust needs no authority to know the host.
"""

import hashlib
import ipaddress
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fanformer.community.identity import certificate_fingerprint
from fanformer.errors import ConfigError, DataError
from fanformer.files.durable import replace_text

_DIGITS = 32
_PATIENCE_SECONDS = 20.0
_LARGEST_STATUS = 64 << 20
_LABEL = r"[A-Za-z0-9_-]{1,63}"
_HOST = re.compile(rf"(?=[A-Za-z0-9]){_LABEL}(\.{_LABEL})*(?<=[A-Za-z0-9])")


class UnreachableError(DataError):
    """A host does not answer for now."""


@dataclass(frozen=True)
class Invitation:
    """Where a host is, and by what it is known.

    Attributes:
        host: name or IP address.
        port: of both, members and the page about the run.
        certificate: beginning of its certificate's SHA-256.
        key: beginning of the SHA-256 of the public key that it signs with, as PEM.
    """

    host: str
    port: int
    certificate: str
    key: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}/#{self.certificate}-{self.key}"

    @property
    def address(self) -> str:
        """Host and port, as Flower takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_address(address: str) -> None:
    """Refuse what members cannot dial.

    Raises:
        ConfigError: if it is neither a name nor an IP address.
    """
    if not _is_address(address):
        raise ConfigError(f"`--address` must be a name or an IP address, got {address!r:.100}: the port is `--port`.")


def _is_address(text: str) -> bool:
    """Return whether a text is an IP address, or a name of labels that a resolver takes."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None
    return True


def invite(host: str, port: int, certificate_pem: str, public_pem: str) -> Invitation:
    """Return the invitation to a host with this certificate and public key."""
    return Invitation(host, port, certificate_fingerprint(certificate_pem)[:_DIGITS], key_fingerprint(public_pem))


def key_fingerprint(public_pem: str) -> str:
    """Return what an invitation says of a public key."""
    return hashlib.sha256(public_pem.encode()).hexdigest()[:_DIGITS]


def parse_invitation(text: str) -> Invitation:
    """Read an invitation.

    Raises:
        ConfigError: if it is none.
    """
    remedy = "copy the whole invitation that `fanformer community host` printed, with all after the `#`."
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    known = re.fullmatch(rf"([0-9a-f]{{{_DIGITS}}})-([0-9a-f]{{{_DIGITS}}})", parts.fragment)
    host = parts.hostname or ""
    if parts.scheme != "https" or not _is_address(host) or port is None or known is None:
        raise ConfigError(f"an invitation must be https://HOST:PORT/#CERTIFICATE-KEY, got {text!r:.200}: {remedy}")
    return Invitation(host, port, *known.groups())


def fetch_certificate(invitation: Invitation, place: Path) -> None:
    """Write the host's certificate, which is to be the invitation's, into a file.

    Raises:
        ConfigError: if the host shows another one.
        UnreachableError: if it does not answer.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is shown is compared below
    try:
        with (
            socket.create_connection((invitation.host, invitation.port), _PATIENCE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=invitation.host) as shown,
        ):
            pem = ssl.DER_cert_to_PEM_cert(shown.getpeercert(binary_form=True) or b"")
    except OSError as error:
        raise unreachable(invitation, error) from error
    got = certificate_fingerprint(pem)
    if not got.startswith(invitation.certificate):
        raise ConfigError(
            f"the certificate of {invitation.address} must begin with {invitation.certificate}, got {got[:_DIGITS]}: "
            "this is not the host of the invitation, or it has a new certificate; ask it for a new invitation."
        )
    replace_text(place, pem)


def unreachable(invitation: Invitation, error: Exception) -> UnreachableError:
    """Return the error for a host that does not answer."""
    return UnreachableError(
        f"no host answers at {invitation.address} ({error}): is it running, and is its port open to the outside?"
    )


def fetch_status(invitation: Invitation, certificate: Path) -> dict[str, Any]:
    """Return what a host says of its run.

    Args:
        invitation: to it.
        certificate: file that `fetch_certificate` wrote.

    Raises:
        UnreachableError: if it does not answer.
        DataError: if it answers with something else.
    """
    context = ssl.create_default_context(cafile=str(certificate))
    host = f"https://{invitation.address}/status.json"
    try:
        with urllib.request.urlopen(host, timeout=_PATIENCE_SECONDS, context=context) as answer:
            content = json.loads(answer.read(_LARGEST_STATUS))
    except (OSError, urllib.error.URLError) as error:
        raise unreachable(invitation, error) from error
    except ValueError as error:
        raise DataError(f"{host} must be JSON, got something else: is this the host of a community run?") from error
    if not isinstance(content, dict):
        raise DataError(f"{host} must be an object of JSON, got {type(content).__name__}: is this a community run?")
    return content
