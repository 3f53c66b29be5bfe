"""Which network addresses a download may connect to.

The check is made on what the name resolved to, and the connection goes to those very addresses: a name that
resolves to another one a moment later (DNS rebinding) is not asked again.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from safelora_vllm.errors import UsageError
from safelora_vllm.remote.refusals import forbidden, unavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?/?")
PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Besides those that `is_global` knows in every Python: they lead inside, or hide an address that does.
_FORBIDDEN = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # metadata and DNS of Azure
            "192.0.0.0/24",  # metadata of Oracle, NAT64 and others
            "192.88.99.0/24",  # 6to4 relays
            "::/96",  # IPv4-compatible
            "64:ff9b:1::/48",  # local NAT64
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
            "fec0::/10",  # site-local
        ),
    )
)


@dataclass(frozen=True)
class Reach:
    """Where a download may go to.

    Attributes:
        endpoints: origins (scheme, host, port) that may have any address and plain http: the operator's word.
        everywhere: every address is allowed: on a command line, whose user can connect to it anyway.
    """

    endpoints: frozenset[tuple[str, str, int]] = frozenset()
    everywhere: bool = False

    @classmethod
    def to(cls, endpoints: Iterable[str]) -> Reach:
        """With the operator's endpoints.

        Raises:
            UsageError: one is not an origin.
        """
        return cls(frozenset(map(_origin, endpoints)))

    def resolve(self, scheme: str, host: str, port: int, shown: str) -> list[tuple[str, int]]:
        """Addresses and port to connect to. Blocking.

        Args:
            scheme: http or https.
            host: a name, or an address without brackets.
            port: number.
            shown: the source, for messages.

        Raises:
            SourceForbidden: source_address, if any of its addresses is not a public one, or for plain http.
            SourceUnavailable: source_unreachable.
        """
        named = self.everywhere or (scheme, host, port) in self.endpoints
        if scheme != "https" and not named:
            raise forbidden(
                "source_address",
                f"{shown} would be read over http: expected https, or an endpoint that the operator allows "
                "(--remote-endpoint)",
            )
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError):
            raise unavailable(
                "source_unreachable", f"the host of {shown} has no address; check its name"
            ) from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not named and not all(map(is_public, addresses)):
            raise forbidden(
                "source_address",
                f"the host of {shown} has an address that is private, link-local, loopback or reserved. Such "
                "an endpoint has to be allowed by the operator (--remote-endpoint)",
            )
        return [(address, port) for address in addresses]


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet, also where it holds another one."""
    try:
        address: Address = ipaddress.ip_address(text)
    except ValueError:  # with a zone: link-local
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    forbidden_net = any(address in network for network in _FORBIDDEN if network.version == address.version)
    plain = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not forbidden_net and not plain


def _origin(text: str) -> tuple[str, str, int]:
    match = _ORIGIN.fullmatch(text)
    port = int(match[3] or PORTS[match[1]]) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise UsageError(
            f"{text!r:.200} is not a valid endpoint: expected http://HOST:PORT or https://HOST:PORT"
        )
    return match[1], match[2].strip("[]"), port
