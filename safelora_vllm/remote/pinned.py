"""One GET request over a connection to an address that was checked. No redirect, proxy or cookie is followed.

obstore's client follows redirects and resolves names itself, and neither can be switched off: it only signs.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from safelora_vllm.remote.reach import PORTS, Reach
from safelora_vllm.remote.refusals import unavailable

CONNECT_SECONDS = 10.0
ADDRESSES = 4  # of a name that are tried
ANSWER_SECONDS = 30.0  # from the connection to the end of the headers, with TLS
PATIENCE_SECONDS = 60.0
PATIENCE_BYTES = 64 * 1024  # that have to come in each such time, as for uploads
_BLOCK = 64 * 1024


class Broken(Exception):
    """The connection could not be made, or ended early. It is worth another try."""


class Answer:
    """Status and headers, and the body as it comes."""

    def __init__(
        self, response: http.client.HTTPResponse, sock: socket.socket, shown: str, end: float
    ) -> None:
        self._response, self._sock, self._shown, self._end = response, sock, shown, end
        self.status = response.status

    def header(self, name: str) -> str:
        """A header's value, '' if it is not there. Different ones of one name are joined by ", "."""
        values = self._response.headers.get_all(name) or []
        return ", ".join(dict.fromkeys(value.strip() for value in values))

    def blocks(self) -> Iterator[bytes]:
        """The body.

        Raises:
            SourceUnavailable: source_slow. Broken: it ended early.
        """
        deadline, come = time.monotonic() + PATIENCE_SECONDS, 0
        while True:
            left = min(deadline, self._end) - time.monotonic()
            if left <= 0:
                raise _slow(self._shown)
            try:
                self._sock.settimeout(left)
                block = self._response.read1(_BLOCK)
            except TimeoutError:
                raise _slow(self._shown) from None
            except (OSError, ValueError, http.client.HTTPException):
                raise Broken from None
            if not block:
                return
            come += len(block)
            if come >= PATIENCE_BYTES:
                deadline, come = time.monotonic() + PATIENCE_SECONDS, 0
            yield block


@contextmanager
def get(url: str, headers: Mapping[str, str], reach: Reach, shown: str, end: float) -> Iterator[Answer]:
    """The answer to a GET request.

    Args:
        url: http or https, with its query.
        headers: besides Host.
        reach: where the connection may go to.
        shown: the source, for messages.
        end: when all has to be over, on the monotonic clock.

    Raises:
        SourceForbidden: source_address. SourceUnavailable: source_slow, source_unreachable. Broken.
    """
    parts = urlsplit(url)
    scheme, host, port = parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme]
    addresses = reach.resolve(scheme, host, port, shown)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = PORTS[scheme]  # Host has no port then
    response = None
    watch = _Watch(_connected(addresses, end), max(0.0, min(ANSWER_SECONDS, end - time.monotonic())))
    try:
        try:
            if scheme == "https":
                context = ssl.create_default_context()
                watch.sock = tls = context.wrap_socket(
                    watch.sock, server_hostname=host, do_handshake_on_connect=False
                )
                tls.do_handshake()
            connection.sock = watch.sock
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=dict(headers))
            response = connection.getresponse()
        except ssl.SSLCertVerificationError:
            raise unavailable(
                "source_unreachable",
                f"the host of {shown} has no certificate that this machine trusts (SSL_CERT_FILE)",
            ) from None
        except (OSError, ValueError, http.client.HTTPException):
            raise (_slow(shown) if watch.late else Broken()) from None
        finally:
            watch.stop()
        if watch.late:  # headers that were cut off look like headers that ended
            raise _slow(shown)
        yield Answer(response, watch.sock, shown, end)
    finally:
        if response is not None:
            response.close()
        connection.close()
        watch.sock.close()


class _Watch:
    """Ends a connection that has no headers after a while, however slowly bytes drip in."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self.sock, self.late = sock, False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """The headers are there."""
        self._timer.cancel()

    def _end(self) -> None:
        self.late = True
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def _connected(addresses: list[tuple[str, int]], end: float) -> socket.socket:
    """A connection to the first that answers. The addresses are numbers: nothing is resolved here."""
    for address in addresses[:ADDRESSES]:
        if (left := end - time.monotonic()) <= 0:
            break
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        sock.settimeout(min(CONNECT_SECONDS, left))
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            continue
        sock.settimeout(ANSWER_SECONDS)
        return sock
    raise Broken


def _slow(shown: str) -> Exception:
    return unavailable(
        "source_slow",
        f"{shown} is too slow: no headers in {ANSWER_SECONDS:.0f} s, less than {PATIENCE_BYTES:,} bytes in "
        f"{PATIENCE_SECONDS:.0f} s, or not done in an hour",
    )
