"""What the server allows: sizes, numbers, seconds, names."""

import ipaddress
import re
from dataclasses import dataclass, field

from fanformer.errors import ConfigError

_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients can take of the server."""

    body_bytes: int = 4 << 20
    """Most bytes of a request's body."""
    media_body_bytes: int = 16 << 20
    """The same where a model takes pictures or recordings."""
    bodies_bytes: int = 256 << 20
    """Most bytes of the bodies of all requests in work."""
    header_bytes: int = 32 << 10
    """Most bytes of a request's head."""
    header_seconds: float = 10.0
    """Until a request's head is complete."""
    body_seconds: float = 30.0
    """Until its body is."""
    idle_seconds: float = 30.0
    """That a connection may be kept without a request."""
    write_seconds: float = 30.0
    """That a client may leave an answer unread."""
    answer_seconds: float = 600.0
    """Until an answer is complete, waiting included."""
    drain_seconds: float = 30.0
    """That answers in work are given after SIGTERM."""
    connections: int = 512
    requests_per_client: int = 128
    """That a client (an API key, or else an address) may have in work."""


@dataclass(frozen=True)
class Access:
    """Who may ask, and from where.

    Raises:
        ConfigError: if a name or origin is written so that no header could ever be it.
    """

    host: str = "127.0.0.1"
    """The address that is bound."""
    keys: tuple[str, ...] = field(default=(), repr=False)
    """API keys; without any, everyone who reaches the server may ask."""
    hosts: frozenset[str] = frozenset()
    """Names besides the loopback's that a Host header may have."""
    origins: frozenset[str] = frozenset()
    """Origins of other web pages that may ask, such as https://example.org."""

    def __post_init__(self) -> None:
        for name in self.hosts:
            if not _HOST.fullmatch(name):
                raise ConfigError(
                    f"`--allowed-host` must be a name or address without scheme and port, such as model.example.org, "
                    f"got {name!r}: with any port it is the same host."
                )
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"`--allow-origin` must be scheme, name and port as a browser sends them, such as "
                    f"https://page.example or http://localhost:3000, got {origin!r}: leave out what follows."
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def allows_host(self, header: str) -> bool:
        """Return whether a Host header names this server: else a web page could reach it by a name of its own.

        A server with a public address has keys, which such a page lacks: its names are checked where some are given.

        Args:
            header: name or address, with or without a port.
        """
        if not self.is_loopback and not self.hosts:
            return True
        name = header.lower()
        if name.rpartition(":")[2].isdigit() and not name.endswith("]"):
            name = name.rpartition(":")[0]
        own = f"[{self.host}]" if ":" in self.host else self.host
        return name in _LOOPBACK_NAMES or name == own.lower() or name in self.hosts

    def allows_origin(self, origin: str, host: str) -> bool:
        """Return whether a web page of `origin` may ask: one of this server itself, or one that is named."""
        return origin in self.origins or origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def is_loopback(host: str) -> bool:
    """Return whether a name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
