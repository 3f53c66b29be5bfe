"""Downloads from servers that do everything wrong: each refusal has its code, and none reaches a forbidden
address."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.errors import AdapterRefused
from safelora_vllm.remote import fetch as fetching
from safelora_vllm.remote import pinned
from safelora_vllm.remote.address import parse
from safelora_vllm.remote.reach import Reach

pytest.importorskip("cryptography", reason="a certificate has to be made")
from tests.remote_servers import Hostile, Listener, Script, drips, head, hostile, ranges, sends

BODY = bytes(range(256)) * 4096  # 1 MiB
SECRET = "X-Amz-Signature=do-not-show"
PUBLIC = "93.184.215.14"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hostile, Path, Listener]]:
    inside = Listener()
    with hostile(tmp_path_factory.mktemp("tls")) as (server, certificate):
        yield server, certificate, inside
    inside.close()


@pytest.fixture
def inside(servers: tuple[Hostile, Path, Listener]) -> Iterator[Listener]:
    """Where nobody may connect to."""
    yield servers[2]
    time.sleep(0.01)
    assert servers[2].connections == 0


@pytest.fixture
def far(servers: tuple[Hostile, Path, Listener], monkeypatch: pytest.MonkeyPatch) -> Hostile:
    """It is trusted, and waiting is short."""
    monkeypatch.setenv("SSL_CERT_FILE", str(servers[1]))
    for module, name, value in [
        (fetching, "PAUSE_SECONDS", 0.001), (pinned, "ANSWER_SECONDS", 0.3),
        (pinned, "PATIENCE_SECONDS", 0.3),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)
    servers[0].requests.clear()
    return servers[0]


def reach(far: Hostile) -> Reach:
    return Reach.to([f"https://localhost:{far.port}"])


def got(far: Hostile, folder: Path, path: str = "a.tar", most: int = 2 * len(BODY), **more: Any) -> bytes:
    done = fetching.fetch(parse(far.url(path)), folder, most, reach(far), **more)
    return done.read_bytes()


def codes(far: Hostile, folder: Path, caplog: pytest.LogCaptureFixture, path: str, **more: Any) -> list[str]:
    """Of a refusal that tells no secret and no address."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AdapterRefused) as refused:
        got(far, folder, path, **more)
    told = f"{refused.value} {caplog.text}"
    assert "do-not-show" not in told and "127.0.0.1" not in told and "evil" not in told
    assert refused.value.__cause__ is None or "do-not-show" not in repr(refused.value.__cause__)
    return refused.value.codes


def redirects(status: int, target: str) -> Script:
    return sends(b"", status=status, Location=target)


EVIL = "evil: AKIAEXAMPLE secret"  # what an answer's body says, which nobody is told
REFUSED: dict[str, tuple[Script, str]] = {
    "denied": (sends(EVIL.encode(), status=403), "source_denied"),
    "key wanted": (sends(b"", status=401), "source_denied"),
    "missing": (sends(EVIL.encode(), status=404), "source_not_found"),
    "gone": (sends(b"", status=410), "source_not_found"),
    "teapot": (sends(b"", status=418), "source_response"),
    "no content": (sends(b"", status=204), "source_response"),
    "not modified": (sends(b"", status=304), "source_response"),
    "a part nobody asked for": (
        sends(b"x", status=206, Content_Range="bytes 0-0/9"), "source_response"),
    "precondition": (sends(b"", status=412), "source_changed"),
    "always 500": (sends(EVIL.encode(), status=500), "source_unreachable"),
    "always 503": (sends(b"", status=503), "source_unreachable"),
    "no length": (lambda _path, _asked, send, _n: send(head(ETag='"e"') + BODY), "source_response"),
    "chunks": (drips(head(Transfer_Encoding="chunked"), b"1\r\nx\r\n"), "source_response"),
    "chunks and a length": (
        sends(BODY, Transfer_Encoding="chunked"), "source_response"),
    "endless chunks behind two transfer encodings": (
        drips(
            b"HTTP/1.1 200 X\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n"
            b"Transfer-Encoding: identity\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        "source_response"),
    "two lengths": (
        lambda _path, _asked, send, _n: send(
            b"HTTP/1.1 200 X\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        "source_response"),
    "negative length": (sends(b"x", Content_Length=-1), "source_response"),
    "length in words": (sends(b"x", Content_Length="many"), "source_response"),
    "length with a sign": (sends(b"x", Content_Length="+1"), "source_response"),
    "announced too large": (sends(b"x", Content_Length=10**15), "too_large"),
    "one byte too large": (sends(b"x", Content_Length=2 * len(BODY) + 1), "too_large"),
    "gzip": (sends(b"x", Content_Encoding="gzip"), "source_response"),
    "body without end": (drips(head(Content_Length=len(BODY)), b"x"), "source_slow"),
    "headers without end": (drips(b"HTTP/1.1 200 X\r\nX-A: ", b"a"), "source_slow"),
    "many headers": (drips(b"HTTP/1.1 200 X\r\n", b"X-A: a\r\n" * 1000), "source_unreachable"),
    "status line without end": (drips(b"HTTP/1.1 200 ", b"a" * 70_000), "source_unreachable"),
    "silence": (lambda *_: time.sleep(0.6), "source_slow"),
    "not http": (lambda _path, _asked, send, _n: send(b"SSH-2.0-OpenSSH\r\n\r\n"), "source_unreachable"),
    "nothing": (lambda *_: None, "source_unreachable"),
    "too short, again and again": (sends(b"x", Content_Length=1000, ETag=None), "source_unreachable"),
    "a weak etag": (sends(b"x", Content_Length=1000, ETag='W/"a"'), "source_unreachable"),
    "changed between parts": (ranges(BODY, 5000, ('"e1"', '"e2"')), "source_changed"),
    "etag lost between parts": (ranges(BODY, 5000, ('"e1"', "")), "source_changed"),
    "changed, without ranges": (ranges(BODY, 5000, ('"e1"', '"e2"'), ignore=True), "source_changed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_answer_that_is_refused(
    case: str, far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far.script, code = REFUSED[case]
    assert codes(far, tmp_path, caplog, f"a.tar?{SECRET}") == [code]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_redirect_is_followed(
    status: int, scheme: str, far: Hostile, inside: Listener, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    far.script = redirects(status, f"{scheme}://127.0.0.1:{inside.port}/latest/meta-data/")
    assert codes(far, tmp_path, caplog, f"a.tar?{SECRET}") == ["source_redirect"]
    assert len(far.requests) == 1


def test_other_parts_than_the_one_asked_for(
    far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, wrong in enumerate(
        ["bytes 0-9/10", "bytes 5-9/12", "bytes 5-8/10", "bytes */10", "5-9/10", ""]
    ):

        def script(_path: str, asked: dict[str, str], send: Any, _n: int, wrong: str = wrong) -> None:
            more = {"Content_Range": wrong} if "range" in asked else {}
            send(head(206 if more else 200, Content_Length=5 if more else 10, ETag='"e"', **more) + b"01234")

        far.script = script
        folder = tmp_path / str(number)
        folder.mkdir()
        assert codes(far, folder, caplog, "a.tar") == ["source_response"], wrong


def test_a_size_that_changes_between_parts(
    far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(_path: str, asked: dict[str, str], send: Any, _n: int) -> None:
        more = {"Content_Range": "bytes 5-11/12"} if "range" in asked else {}
        send(head(206 if more else 200, Content_Length=7 if more else 10, ETag='"e"', **more) + b"01234")

    far.script = script
    assert codes(far, tmp_path, caplog, "a.tar") == ["source_changed"]


def test_a_connection_that_breaks_off_is_resumed(far: Hostile, tmp_path: Path) -> None:
    far.script = ranges(BODY, 300_000)
    assert got(far, tmp_path, f"a.tar?{SECRET}") == BODY
    asked = [headers.get("range") for _, headers in far.requests]
    assert asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert all(headers["if-match"] == '"e1"' for _, headers in far.requests[1:])
    assert all(path == f"/a.tar?{SECRET}" for path, _ in far.requests)
    assert all(headers["host"] == f"localhost:{far.port}" for _, headers in far.requests)


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_an_etag_it_begins_again(etag: str | None, far: Hostile, tmp_path: Path) -> None:
    def script(_path: str, asked: dict[str, str], send: Any, n: int) -> None:
        assert "range" not in asked
        send(head(Content_Length=len(BODY), ETag=etag) + (BODY if n == 2 else b"other bytes"))

    far.script = script
    assert got(far, tmp_path) == BODY


# bytes that are there, the answer, the code or "" where it is good
GOES_ON: dict[str, tuple[int, Script, str]] = {
    "all there": (10, sends(b"", status=304), ""),
    "all there, condition unknown": (10, sends(b"0123456789"), ""),
    "all there, another version": (10, sends(b"0123456789", ETag='"e2"'), "source_changed"),
    "all there, another size": (10, sends(b"01234567890"), "source_changed"),
    "all there, a part of it": (10, sends(b"9", status=206, Content_Range="bytes 9-9/10"), "source_response"),
    "all there, removed": (10, sends(b"", status=404), "source_not_found"),
    "all there, elsewhere": (10, redirects(302, "https://127.0.0.1/a.tar"), "source_redirect"),
    "begun": (4, sends(b"456789", status=206, Content_Range="bytes 4-9/10"), ""),
    "begun, no ranges": (4, sends(b"0123456789"), ""),
    "begun, not modified": (4, sends(b"", status=304), "source_response"),
    "begun, another version": (4, sends(b"", status=412), "source_changed"),
    "begun, another version all the same": (
        4, sends(b"456789", status=206, Content_Range="bytes 4-9/10", ETag='"e2"'), "source_changed"),
    "begun, no version": (
        4, sends(b"456789", status=206, Content_Range="bytes 4-9/10", ETag=None), "source_changed"),
    "begun, another size": (
        4, sends(b"456789x", status=206, Content_Range="bytes 4-10/11"), "source_changed"),
    "begun, from the beginning": (
        4, sends(b"0123456789", status=206, Content_Range="bytes 0-9/10"), "source_response"),
    "begun, and no further": (4, sends(b"", status=416), "source_changed"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOES_ON)
def test_a_download_that_an_earlier_process_began(case: str, far: Hostile, tmp_path: Path) -> None:
    """The file is the object, or the refusal has its code and what is noted of the file stays true."""
    count, far.script, code = GOES_ON[case]
    file, notes = tmp_path / "a", [fetching.Seen('"e1"', 10)]
    file.write_bytes(b"0123456789"[:count])

    def keep(stream: Any, seen: fetching.Seen | None) -> None:
        assert stream.tell() == (10 if seen else count)
        notes[:] = [seen] if seen else []

    arguments = parse(far.url("a.tar")), file, 100, reach(far), notes[0], keep
    if not code:
        fetching.fetch_object(*arguments)
        assert file.read_bytes() == b"0123456789" and notes == [fetching.Seen('"e1"', 10)]
    else:
        with pytest.raises(AdapterRefused) as refused:
            fetching.fetch_object(*arguments)
        assert refused.value.codes == [code]
        assert file.read_bytes() == b"0123456789"[:count]
    asked = far.requests[0][1]
    assert ("if-none-match" in asked, "if-match" in asked) == (count == 10, count < 10)
    assert len(far.requests) == 1


def test_more_than_was_announced_is_not_read(far: Hostile, tmp_path: Path) -> None:
    far.script = sends(BODY + b"more", Content_Length=len(BODY))
    assert got(far, tmp_path) == BODY


def test_the_expected_digest_of_an_archive(
    far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far.script = sends(BODY)
    right = f"sha256:{hashlib.sha256(BODY).hexdigest()}"
    for number, (digest, fits) in enumerate(
        [
            (right, True),
            (right[:-1] + "x", False),
            ("sha256:" + "0" * 64, False),
            (right[7:], False),
            ("", False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        if fits:
            assert got(far, folder, digest=digest) == BODY
        else:
            assert codes(far, folder, caplog, "a.tar", digest=digest) == ["source_digest"]


def _folder(etags: dict[str, list[str]], bodies: dict[str, list[bytes]]) -> Script:
    seen: dict[str, int] = {}

    def script(path: str, _asked: dict[str, str], send: Any, _n: int) -> None:
        name = path.rpartition("/")[2]
        at = seen[name] = seen.get(name, -1) + 1
        body, etag = (values[min(at, len(values) - 1)] for values in (bodies[name], etags[name]))
        send(head(Content_Length=len(body), ETag=etag) + body)

    return script


def test_a_folder_has_both_files_and_its_digest(far: Hostile, tmp_path: Path) -> None:
    far.script = _folder({CONFIG: ['"c"'], WEIGHTS: ['"w"']}, {CONFIG: [b"{}"], WEIGHTS: [BODY]})
    done = fetching.fetch(
        parse(far.url("some/folder/")), tmp_path, len(BODY), reach(far), content_digest(b"{}", BODY)
    )
    assert done == tmp_path and {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("status", [200, 404, 403, 302])
def test_the_signature_of_a_folder(
    status: int, far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It need not be there; S3 says 403 then where it may not list."""
    folder = _folder({CONFIG: ['"c"'], WEIGHTS: ['"w"']}, {CONFIG: [b"{}"], WEIGHTS: [BODY]})
    signature = sends(b"{}", status=status, Location="https://evil.example")

    def script(path: str, asked: dict[str, str], send: Any, n: int) -> None:
        (signature if path.endswith("model.sig") else folder)(path, asked, send, n)

    far.script = script
    if status == 302:
        assert codes(far, tmp_path, caplog, "some/folder/", signature=True) == ["source_redirect"]
        return
    fetching.fetch(parse(far.url("some/folder/")), tmp_path, len(BODY), reach(far), signature=True)
    more = {"model.sig"} if status == 200 else set()
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS} | more


@pytest.mark.parametrize("etags", [['"c"', '"d"'], [""]])
def test_a_folder_whose_config_changes_while_the_weights_are_read(
    etags: list[str], far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far.script = _folder({CONFIG: etags, WEIGHTS: ['"w"']}, {CONFIG: [b"{}", b"{ }"], WEIGHTS: [BODY]})
    assert codes(far, tmp_path, caplog, "some/folder") == ["source_changed"]


def test_a_config_that_is_too_large(far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    far.script = sends(BODY + b"x")
    assert codes(far, tmp_path, caplog, "some/folder") == ["too_large"]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1", "fd00:ec2::254"]
)
def test_a_name_that_leads_inside(
    address: str, far: Hostile, inside: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda _host, port, **_: [(2, 1, 6, "", (address, port))])
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse(f"https://rebinding.example:{inside.port}/a.tar"), tmp_path, 10, reach(far))
    assert refused.value.codes == ["source_address"] and not tried


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost"])
def test_an_address_inside_that_is_written_out(host: str, inside: Listener, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse(f"https://{host}:{inside.port}/a.tar"), tmp_path, 10, Reach())
    assert refused.value.codes == ["source_address"]


@pytest.mark.usefixtures("far")
def test_rebinding_between_the_check_and_the_connection(
    inside: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name leads outside when it is checked and inside from then on. The connection goes to what was
    checked; it fails here, and the check of the second try refuses."""
    asked: list[str] = []
    tried: list[Any] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", (PUBLIC if len(asked) == 1 else "127.0.0.1", port))]

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse(f"https://rebinding.example:{inside.port}/a.tar"), tmp_path, 10, Reach())
    assert refused.value.codes == ["source_address"]
    assert tried == [(PUBLIC, inside.port)] and len(asked) == 2


def test_rebinding_between_two_parts(
    far: Hostile, inside: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = socket.socket.connect
    far.script = ranges(BODY, 300_000)

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", (PUBLIC if len(asked) == 1 else "127.0.0.1", port))]

    def connect(sock: socket.socket, address: Any) -> None:
        assert address == (PUBLIC, inside.port)
        real(sock, ("127.0.0.1", far.port))  # the public server

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse(f"https://rebinding.example:{inside.port}/a.tar"), tmp_path, 2**30, Reach())
    assert refused.value.codes == ["source_address"]


@pytest.mark.usefixtures("far")
def test_a_name_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse("https://nowhere.example/a.tar"), tmp_path, 10, Reach())
    assert refused.value.codes == ["source_unreachable"]


def test_a_certificate_of_somebody_else(
    far: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(AdapterRefused) as refused:
        got(far, tmp_path)
    assert refused.value.codes == ["source_unreachable"] and "certificate" in str(refused.value)
    assert not far.requests


def test_proxies_of_the_environment_are_not_used(
    far: Hostile, inside: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{inside.port}")
    far.script = sends(BODY)
    assert got(far, tmp_path) == BODY


@pytest.mark.usefixtures("far")
def test_many_addresses_are_not_all_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may have thousands that do not answer, and each would take ten seconds."""
    tried: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise TimeoutError

    found = [(2, 1, 6, "", (f"93.184.{n}.14", 443)) for n in range(100)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(AdapterRefused) as refused:
        fetching.fetch(parse("https://many.example/a.tar"), tmp_path, 10, Reach())
    assert refused.value.codes == ["source_unreachable"] and len(tried) == 4 * fetching.TRIES


def test_a_body_longer_than_announced_stops_at_once(
    far: Hostile, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever headers make the client read on."""
    far.script = sends(b"", Content_Length=10)
    monkeypatch.setattr(pinned.Answer, "blocks", lambda _: iter([b"x" * 8] * 1000))
    assert codes(far, tmp_path, caplog, "a.tar") == ["source_response"]
    assert (tmp_path / "archive").stat().st_size <= 10
