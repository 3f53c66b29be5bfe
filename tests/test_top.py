"""`safelora-vllm top` against a small HTTP server: what it shows, its errors, and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from rich.console import Console

from safelora_vllm.cli.main import main
from safelora_vllm.cli.top import Server
from safelora_vllm.cli.top_view import Frame
from safelora_vllm.errors import UsageError

KEY = "a-key-of-this-test"


def adapter(name: str, state: str = "served", **more: Any) -> dict[str, Any]:
    figures = {"modules": 60, "projected": 41, "least_retained": 0.41, "total_norm": 0.0312}
    plain = {
        "name": name, "state": state, "reasons": [], "version": 3, "created": time.time() - 200, "rank": 8,
        "mode": "enforce", "override": False, "figures": figures if state == "served" else None,
    }  # fmt: skip
    return {**plain, **more}


def answer(count: int = 30) -> dict[str, Any]:
    adapters = [adapter(f"acme/orders-{i:02d}") for i in range(count)]
    adapters += [
        adapter("globex/" + 90 * "long", "refused", reasons=[{"code": "total_norm", "message": "too large"}]),
        adapter("globex/lost", "unavailable", created=None, version=None, mode=None),
        adapter("mail\x1b[2J", mode="report-only", override=True, created=time.time()),
    ]
    record = {
        "time": "2026-01-31T13:00:00.000005+00:00",
        "action": "upload",
        "adapter": "acme/bad",
        "reasons": ["dora"],
    }
    caller = {"kind": "tenant", "key": "acme/ci", "tenant": "acme"}
    return {"caller": caller, "may_upload": True, "adapters": adapters, "records": [record]}


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    status = 200

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        accepted = self.headers["Authorization"] == f"Bearer {KEY}"
        text = json.dumps(answer()).encode()
        self.send_response(self.status if accepted else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SAFELORA_KEY", KEY)
    monkeypatch.setattr(Handler, "status", 200)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def shown(width: int, height: int, count: int = 30, trouble: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    found = answer(count)
    frame = Frame("http://localhost:8000", {**found, "refusals": found["records"]}, console)
    frame.trouble = trouble
    console.print(frame.rendered())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (60, 15), (160, 40)])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    for trouble in ("", "no answer from http://localhost:8000: it is gone. " * 4):
        lines = shown(width, height, trouble=trouble)
        assert len(lines) <= height and max(map(len, lines)) <= width, "\n".join(lines)
        text = "\n".join(lines)
        assert "33 adapters: 31 served, 1 refused, 1 unavailable; 1 UNPROJECTED" in text or width < 80
        assert "refused: total_norm" in text, "what is not served comes first"
        assert ("acme/orders-00" in text) == (height == 50) != ("more; a taller terminal" in text)
        assert "\x1b" not in text
        if trouble:
            assert "no answer from" in text


def test_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(shown(80, 40, count=2))
    assert all(word in text for word in ("41/60", "0.0312", "3 min", "fixed", "Newest refusals", "dora"))
    assert "least retained" not in text and "least retained" in "\n".join(shown(120, 40, count=2))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("width", "words", "missing"),
    [
        (60, [], "exam"),
        (80, ["exam", "passed", "by opinion", "failed"], "0.0123"),
        (120, ["passed 0.0123", "failed 0.3000", "failed"], "safe-lora"),
        (
            170,
            ["passed 0.0123 as-uploaded", "by opinion 0.4000 as-uploaded+opinion", "failed 0.3000 safe-lora"],
            "None",
        ),
    ],
)
def test_exams_and_second_opinions(width: int, words: list[str], missing: str) -> None:
    examined = [
        adapter("a", exam={"passed": True, "rung": "as-uploaded", "bound": 0.0123}, second_opinion=False),
        adapter("e", exam={"passed": True, "by_opinion": True, "rung": "as-uploaded+opinion", "bound": 0.4}),
        adapter("b", exam={"passed": False, "rung": "safe-lora", "bound": 0.3}, second_opinion=False),
        adapter("c", exam={"passed": False, "rung": None, "bound": None}, second_opinion=False),
        adapter("d", exam=None),
    ]
    console = Console(file=io.StringIO(), width=width, height=40)
    Frame("http://x", {**answer(0), "adapters": examined}, console).print_once()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(word in text for word in words) and missing not in text, text
    assert max(map(len, text.splitlines())) <= width


def table_of(width: int, *adapters: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=width, height=40)
    Frame("http://x", {**answer(0), "adapters": list(adapters)}, console).print_once()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


AS_UPLOADED: dict[str, Any] = {"method": "none"}
BY_OPINION = {**AS_UPLOADED, "second_opinion": True}
EXAM: dict[str, Any] = {"passed": True, "rung": "as-uploaded", "bound": 0.01}


@pytest.mark.parametrize(
    ("more", "state", "counted"),
    [
        (BY_OPINION, "as uploaded, opinion", "; 2 as uploaded, with a second opinion"),
        (
            {**AS_UPLOADED, "exam": {**EXAM, "enforced": True}},
            "as uploaded",
            "; 2 as uploaded, since they passed the exam",
        ),
        ({**AS_UPLOADED, "exam": {**EXAM, "enforced": False}}, "UNPROJECTED", "; 2 UNPROJECTED"),
        (AS_UPLOADED, "UNPROJECTED", "; 2 UNPROJECTED"),
        ({"mode": "report-only", "second_opinion": True}, "UNPROJECTED, opinion", "; 2 UNPROJECTED"),
        ({"second_opinion": True}, "served, opinion", ""),
        ({"override": True}, "served, override", ""),
    ],
    ids=str,
)
def test_what_is_served_as_uploaded_is_told_from_what_nothing_looks_at(
    more: dict[str, Any], state: str, counted: str
) -> None:
    for width in (80, 100, 160):
        text = table_of(width, adapter("a", **more), adapter("b", **more))
        assert f"2 adapters: 2 served{counted}\n" in "\n".join(map(str.rstrip, text.splitlines())) + "\n"
        assert f" {state} " in text and ("UNPROJECTED" in text) == ("UNPROJECTED" in state), text


@pytest.mark.parametrize("more", [BY_OPINION, {"mode": "report-only", "second_opinion": True}], ids=str)
def test_eighty_columns_have_room_for_the_opinion(more: dict[str, Any]) -> None:
    """With the exam's column, and before an override, which is cut."""
    text = table_of(80, adapter("a", **more, override=True, exam={**EXAM, "by_opinion": True}))
    assert ", opinion… " in text and max(map(len, text.splitlines())) <= 80, text


def test_once(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["top", f"{url}/", "--once"]) == 0
    text = capsys.readouterr().out
    assert "as tenant acme" in text and "acme/orders-29" in text and "acme/bad" in text
    assert Handler.asked[-2:] == ["/v1/overview", "/v1/audit?decision=refused&limit=20"]


def test_errors(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["top", *arguments]) == 2
        return capsys.readouterr().err

    assert "is not a valid URL" in error("localhost:8000")
    assert "expected 0.5 to 3600" in error(url, "--interval=0")
    assert "no answer from http://127.0.0.1:9" in error("http://127.0.0.1:9")
    monkeypatch.setattr(Handler, "status", 503)
    assert "answered with status 503" in error(url)
    monkeypatch.setattr(Handler, "status", 404)
    assert "it has no /v1/overview" in error(url)
    monkeypatch.setenv("SAFELORA_KEY", "another")
    assert "the key was not accepted. Set SAFELORA_KEY" in error(url)
    monkeypatch.delenv("SAFELORA_KEY")
    monkeypatch.delenv("SAFELORA_ADMIN_API_KEY", raising=False)
    assert "no key is set" in error(url)
    with pytest.raises(UsageError, match="no key is set"):
        Server(url, "").look()


def test_a_key_that_cannot_be_sent_is_in_no_message(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAFELORA_KEY", f"{KEY}\r")
    assert main(["top", url, "--once"]) == 0, "of a file with other ends of lines"
    monkeypatch.setenv("SAFELORA_KEY", f"{KEY}\rx")
    assert main(["top", url, "--once"]) == 2
    told = capsys.readouterr().err
    assert "SAFELORA_KEY has characters that no key has" in told and KEY not in told
    assert main(["top", "http://[::1:8000"]) == 2
    assert "is not a valid URL" in capsys.readouterr().err


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_key_is_not_sent_on(url: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", f"{url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        log_message = Handler.log_message

    before = len(Handler.asked)
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert main(["top", f"http://127.0.0.1:{server.server_port}", "--once"]) == 2
        server.shutdown()
    assert f"redirects to '{url}/elsewhere'" in capsys.readouterr().err
    assert len(Handler.asked) == before


def test_on_a_terminal_that_changes_its_size(url: str) -> None:
    """Live, in a terminal of its own, until Ctrl-C: exit code 0, no traceback, the screen as it was."""
    main_end, terminal = pty.openpty()

    def sized(rows: int, columns: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(word: str) -> str:
        text, end = "", time.monotonic() + 60
        while word not in text and time.monotonic() < end:
            if select.select([main_end], [], [], 0.2)[0]:
                text += os.read(main_end, 65536).decode(errors="replace")
        assert word in text, text[-2000:]
        return text

    sized(24, 80)
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "safelora_vllm.cli", "top", url, "--interval=0.5"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
    )  # fmt: skip
    try:
        assert "least retained" not in read_until("Newest refusals")
        sized(40, 130)
        read_until("least retained")
        process.send_signal(signal.SIGINT)
        rest = read_until("\x1b[?1049l")  # back from the other screen
        assert process.wait(20) == 0 and "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
        os.close(main_end)
        os.close(terminal)
