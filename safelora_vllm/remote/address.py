"""Addresses of remote adapters (``s3://``, ``gs://``, ``az://``, ``https://``) and prefixes that allow them.

An address has one spelling only: what two programs could read differently is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from safelora_vllm.errors import AdapterRefused, UsageError, refuse

CLOUDS = ("s3", "gs", "az")
SCHEMES = (*CLOUDS, "https")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_HTTPS_PORT = 443
_MAX = 4096
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9!$&'()*+,;=:@._~-]+")
_ESCAPED = re.compile(r"(?:[A-Za-z0-9!$&'()*+,;=:@._~-]|%[0-9A-Fa-f]{2})+")
# '.', '/', '\', ';', '%' and control characters, and what overlong UTF-8 begins with
_HIDING = re.compile(r"%(?:2e|2f|5c|3b|25|7f|[01][0-9a-f]|c[01]|e0%[89]|f0%8)", re.I)
_QUERY = re.compile(r"[A-Za-z0-9!$&'()*+,;=:@._~%/?-]*")


@dataclass(frozen=True)
class Source:
    """An address that was parsed. Its text has no query, which is a secret in a presigned URL.

    Attributes:
        scheme: one of `SCHEMES`.
        host: lower case; of a cloud, the bucket or container.
        port: of https.
        segments: of the path, as they are written.
        query: of https.
    """

    scheme: str
    host: str
    port: int
    segments: tuple[str, ...]
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}/{'/'.join(self.segments)}"

    def __repr__(self) -> str:
        return f"Source({str(self)!r})"

    @property
    def authority(self) -> str:
        """Host and port as they are written in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (0, _HTTPS_PORT) else f"{host}:{self.port}"

    @property
    def is_archive(self) -> bool:
        """Whether it is one object and not a folder. A presigned URL is of one object."""
        return bool(self.query) or (self.segments != () and self.segments[-1].endswith(ARCHIVES))

    def child(self, name: str) -> Source:
        """A file in this folder."""
        return replace(self, segments=(*self.segments, name))

    def within(self, prefix: Source) -> bool:
        """Whether a prefix allows this address: whole parts of a path count, never the beginning of one."""
        same = (self.scheme, self.host, self.port) == (prefix.scheme, prefix.host, prefix.port)
        return same and self.segments[: len(prefix.segments)] == prefix.segments


def is_remote(text: str) -> bool:
    """Whether it has a scheme, so that it is not the path of a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def parse(text: str) -> Source:
    """An address.

    Raises:
        AdapterRefused: source_malformed. The sentence does not repeat the address, which may hold a secret.
    """
    scheme, mark, rest = text.partition("://")
    if not mark or scheme not in SCHEMES:
        raise _malformed(f"its scheme is not one of {', '.join(SCHEMES)}")
    if len(text) > _MAX or not all("!" <= character <= "~" for character in text):
        raise _malformed(
            f"it has more than {_MAX:,} characters, or one that is not printable ASCII: write other "
            "characters of a host as xn--..., of an https path as %XX"
        )
    authority, _, path = rest.partition("/")
    host, port, query = authority, 0, ""
    if scheme == "https":
        host, port = _host_and_port(authority)
        path, _, query = path.partition("?")
        if not _QUERY.fullmatch(query):
            raise _malformed("its query has a character that has to be written as %XX")
    elif not _BUCKET.fullmatch(host):
        raise _malformed(
            "its bucket or container is not 3 to 222 lower-case letters, digits, '.', '_' or '-'"
        )
    return Source(scheme, host, port, _segments(path, scheme), query)


def parse_prefix(text: str) -> Source:
    """An entry of an allowlist: a bucket or a host, and maybe the beginning of a path.

    Raises:
        UsageError: it is not one.
    """
    try:
        found = parse(text)
    except AdapterRefused as error:
        raise UsageError(
            f"{text!r:.200} is not a valid prefix of remote sources: {error.reasons[0].message}"
        ) from None
    if "?" in text:
        raise UsageError(
            f"{text.partition('?')[0]!r:.200} is not a valid prefix of remote sources: it has a query"
        )
    return found


def allowed(source: Source, prefixes: Iterable[Source]) -> bool:
    """Whether any prefix allows an address."""
    return any(source.within(prefix) for prefix in prefixes)


def _host_and_port(authority: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?", authority)
    if match is None or "@" in authority:
        raise _malformed(
            "it is not https://HOST/PATH or https://HOST:PORT/PATH; a user or password is not read"
        )
    port = int(match[2] or _HTTPS_PORT)
    if not 1 <= port <= 65535:
        raise _malformed("its port is not 1 to 65535")
    host = match[1].lower()
    try:
        if host.startswith("["):
            return str(ipaddress.IPv6Address(_without_zone(host[1:-1]))), port
        if _NUMBER.fullmatch(host.rpartition(".")[2]):  # else 0x7f.1 and 2130706433 would be addresses
            return str(ipaddress.IPv4Address(host)), port
    except ValueError:
        raise _malformed(
            "its host is a number but not an address in the usual form, such as 192.0.2.1"
        ) from None
    if not _NAME.fullmatch(host):
        raise _malformed(
            "its host is not a name of letters, digits, '-' and '.'; write other letters as xn--..."
        )
    return host, port


def _without_zone(host: str) -> str:
    if "%" in host:
        raise ValueError("a zone")
    return host


def _segments(path: str, scheme: str) -> tuple[str, ...]:
    parts = path.removesuffix("/").split("/") if path.removesuffix("/") else []
    good = _ESCAPED if scheme == "https" else _SEGMENT
    for part in parts:
        plain = part.partition(";")[0]  # servers of Java cut path parameters off: '..;' is '..' to them
        if plain in ("", ".", "..") or not good.fullmatch(part) or _HIDING.search(part):
            raise _malformed("its path has an empty part, '.', '..' or a character that is not allowed there")
    return tuple(parts)


def _malformed(cause: str) -> AdapterRefused:
    return refuse(
        "source_malformed",
        f"the address of the adapter is not valid: {cause}. Expected s3://BUCKET/PATH, gs://BUCKET/PATH, "
        "az://CONTAINER/PATH or https://HOST/PATH",
    )
