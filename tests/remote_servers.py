"""Servers on the loopback that a download may meet: one over TLS that does what a test says, and a listener
that nobody may connect to."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Send = Callable[[bytes], None]
Script = Callable[
    [str, dict[str, str], Send, int], None
]  # path, headers, send, how many requests came before


class Listener:
    """Counts connections and says nothing."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                connection.close()

    def close(self) -> None:
        self._socket.close()


class Hostile:
    """A server over TLS. requests: the path and the headers of each."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.script: Script = lambda *_: None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def url(self, path: str = "a.tar", host: str = "localhost") -> str:
        return f"https://{host}:{self.port}/{path}"

    def close(self) -> None:
        self._socket.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(5)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), self._context.wrap_socket(connection, server_side=True) as tls:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := tls.recv(4096)):
                    return
                data += more
            first, *lines = data.decode().split("\r\n\r\n")[0].split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            path = first.split(" ")[1]
            self.requests.append((path, headers))
            self.script(path, headers, tls.sendall, len(self.requests) - 1)


@contextmanager
def hostile(folder: Path) -> Iterator[tuple[Hostile, Path]]:
    """The server, and the file with the certificate to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(host) for host in ("localhost", "rebinding.example", "bucket.example")]
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    certificate = folder / "certificate.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = folder / "key.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    server = Hostile(context)
    try:
        yield server, certificate
    finally:
        server.close()


def head(status: int = 200, **headers: object) -> bytes:
    """The first part of an answer. Underscores of names are hyphens; None leaves a header out."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode()


def sends(body: bytes, *, status: int = 200, **headers: object) -> Script:
    """An answer that is the same for every request."""
    given = {"Content_Length": len(body), "ETag": '"e1"', **headers}
    return lambda _path, _asked, send, _n: send(head(status, **given) + body)


def drips(first: bytes, drop: bytes, pause: float = 0.02) -> Script:
    """What never ends."""

    def script(_path: str, _asked: dict[str, str], send: Send, _n: int) -> None:
        send(first)
        while True:
            time.sleep(pause)
            send(drop)

    return script


def ranges(body: bytes, part: int, etags: tuple[str, ...] = ('"e1"',), ignore: bool = False) -> Script:
    """An object whose connections end after ``part`` bytes. etags: of the answers; the last one stays."""

    def script(_path: str, asked: dict[str, str], send: Send, n: int) -> None:
        at = int(asked["range"].removeprefix("bytes=").rstrip("-")) if "range" in asked and not ignore else 0
        etag = etags[min(n, len(etags) - 1)]
        more = {"Content_Range": f"bytes {at}-{len(body) - 1}/{len(body)}"} if at else {}
        send(
            head(206 if at else 200, Content_Length=len(body) - at, ETag=etag, **more) + body[at : at + part]
        )

    return script
