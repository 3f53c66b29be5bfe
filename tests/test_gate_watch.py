"""The thread that starts the gate process again: it must outlive whatever goes wrong at a start."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.errors import GateUnavailable, GuardError
from safelora_vllm.gate.protocol import Failure, GateConfig, GateState, encode
from safelora_vllm.gate.supervisor import GateProcess, _end
from safelora_vllm.policy import Policy
from safelora_vllm.settings import ServerSettings

CONFIG = GateConfig("none", "none", ServerSettings("none", "none"))
FIRST, SECOND = (GateState("p", Policy(), "r", "none", pid, 0.0) for pid in (1, 2))
Start = Callable[[list[str | OSError]], list[subprocess.Popen[bytes]]]
NO_MEMORY = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
ENDS = f"read settings; echo '{encode(FIRST).decode().strip()}'"
STAYS = f"read settings; echo '{encode(SECOND).decode().strip()}'; read nothing"
# What a gate may say at its start instead; each of them then stays until it is ended.
NONSENSE = [
    "Segmentation fault",
    "null",
    "[]",
    '"error"',
    '{"type": "state"}',
    '{"type": "error", "kind": "SafeLoRAError"}',
    '{"type": "error", "kind": "Exit", "message": "x"}',
    '{"type": "metrics", "text": ""}',
    "{}",
    "\\0377\\0376",
]


def says(text: str) -> str:
    """A gate that says this at its start."""
    return f"read settings; printf '%b\\n' '{text}'; read nothing"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Sets what the next processes are, shell scripts or errors; returns those that were started."""
    popen = subprocess.Popen

    def prepare(gates: list[str | OSError]) -> list[subprocess.Popen[bytes]]:
        coming, started = iter(gates), []

        def fake(_: list[str], **options: Any) -> subprocess.Popen[bytes]:
            gate = next(coming)
            if isinstance(gate, OSError):
                raise gate
            started.append(popen(["/bin/sh", "-c", gate], **options))
            return started[-1]

        monkeypatch.setattr("safelora_vllm.gate.supervisor.subprocess.Popen", fake)
        monkeypatch.setattr("safelora_vllm.gate.supervisor._RESTART_SECONDS", 0.01)
        return started

    return prepare


def test_it_goes_on_after_every_failed_start(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    told = says(encode(Failure("ProjectorCacheError", "no projector cache")).decode().strip())
    failing = [NO_MEMORY, NO_MEMORY, *map(says, NONSENSE), told, "exit 3"]
    started = start([ENDS, *failing, STAYS])
    process = GateProcess(CONFIG)
    try:
        assert process.state == FIRST
        end = time.monotonic() + 60
        while process.state != SECOND:
            assert time.monotonic() < end and process._watcher.is_alive()
            time.sleep(0.02)
        assert [child.returncode is None for child in started] == [False] * (len(started) - 1) + [True]
        text = caplog.text
        for reason in (
            "Cannot allocate memory",
            "'Segmentation fault' is not a valid",
            "no projector cache",
            "code 3",
        ):
            assert reason in text
    finally:
        process.close()
    assert not process._watcher.is_alive() and started[-1].returncode is not None


def test_its_environment_is_its_workers_but_for_what_is_given_and_what_is_not_for_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("VISIBLE", "PROMETHEUS_MULTIPROC_DIR", "VLLM_PLUGINS", "KEPT"):
        monkeypatch.setenv(name, "inherited")
    start([f"env > '{tmp_path}/seen'; {STAYS}"])
    GateProcess(CONFIG, {"VISIBLE": "3"}).close()
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {"VISIBLE=3", "KEPT=inherited"} <= set(seen)
    assert not [line for line in seen if line.startswith(("PROMETHEUS_MULTIPROC_DIR", "VLLM_PLUGINS"))]


def test_it_inherits_no_secret(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It parses what strangers send: what it does not know cannot be taken from it."""
    names = (
        "SAFELORA_ADMIN_API_KEY", "SAFELORA_METRICS_KEY", "SAFELORA_KEY", "VLLM_API_KEY", "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
    )  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, f"the-secret-of-{name}")
    start([f"env > '{tmp_path}/seen'; {STAYS}"])
    GateProcess(CONFIG).close()
    assert "the-secret-of" not in (tmp_path / "seen").read_text()


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (NO_MEMORY, "cannot be started .*Cannot allocate memory"),
        (
            says("Segmentation fault"),
            "'Segmentation fault' is not a valid answer of a gate: JSON is malformed",
        ),
        ("exit 3", "ended at its start with code 3"),
    ],
)
def test_a_first_start_that_fails_is_told(gate: str | OSError, message: str, start: Start) -> None:
    started = start([gate])
    with pytest.raises(GateUnavailable, match=message):
        GateProcess(CONFIG)
    assert all(child.returncode is not None for child in started)


def test_the_class_of_an_error_is_kept(
    start: Start,
) -> None:
    start([says(encode(Failure("GuardError", "open to all")).decode().strip())])
    with pytest.raises(GuardError, match="open to all"):
        GateProcess(CONFIG)


def test_a_process_that_is_started_while_it_is_closed_is_ended(
    start: Start,
) -> None:
    started = start([ENDS, "read settings; sleep 0.5; " + STAYS.removeprefix("read settings; ")])
    process = GateProcess(CONFIG)
    end = time.monotonic() + 60
    while len(started) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.close()
    assert [child.returncode is not None for child in started] == [True, True]


def test_closing_waits_for_no_gate_that_is_starting(start: Start) -> None:
    """It may be reading a cache from a slow disk, and end only with it."""
    started = start([ENDS, "read settings; exec sleep 600"])
    process = GateProcess(CONFIG)
    end = time.monotonic() + 60
    while len(started) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.close()
    assert time.monotonic() < end and all(child.returncode is not None for child in started)


def test_only_silences_in_a_row_end_a_gate(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = iter([False, True, False, True, False, True]), threading.Event()

    def state(*_: object, **__: object) -> SimpleNamespace:
        answer = next(answers, None)
        if answer is None:
            asked.set()
        if answer is False:
            raise GateUnavailable("busy elsewhere")
        return SimpleNamespace(busy_seconds=0.0)

    monkeypatch.setattr("safelora_vllm.gate.client.GateClient.state", state)
    monkeypatch.setattr("safelora_vllm.gate.supervisor._LOOK_SECONDS", 0.01)
    started = start([STAYS, STAYS])
    process = GateProcess(CONFIG)
    try:
        assert asked.wait(60)
        assert len(started) == 1 and started[0].returncode is None
    finally:
        process.close()


def watched(
    start: Start, monkeypatch: pytest.MonkeyPatch, state: Callable[[], float]
) -> tuple[list[subprocess.Popen[bytes]], list[int]]:
    """Lets a gate be looked at until it is replaced; the processes, and the looks at each of them.

    state: how long it has been busy; an error is a silence.
    """
    looks: list[int] = []

    def look(*_: object, **__: object) -> SimpleNamespace:
        looks.append(len(started))
        return SimpleNamespace(busy_seconds=0.0 if len(started) > 1 else state())

    monkeypatch.setattr("safelora_vllm.gate.client.GateClient.state", look)
    monkeypatch.setattr("safelora_vllm.gate.supervisor._LOOK_SECONDS", 0.01)
    started = start([STAYS, STAYS])
    process = GateProcess(CONFIG)
    try:
        end = time.monotonic() + 60
        while 2 not in looks:
            assert time.monotonic() < end and process._watcher.is_alive()
            time.sleep(0.005)
        assert started[0].returncode is not None and started[1].returncode is None
    finally:
        process.close()
    return started, looks


@pytest.mark.parametrize("error", [GateUnavailable("hangs"), ValueError("odd")], ids=["ours", "another"])
def test_a_gate_is_ended_at_its_second_silence_in_a_row(
    error: Exception, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> float:
        raise error

    _, looks = watched(start, monkeypatch, silent)
    assert looks.count(1) == 2


def test_a_gate_that_has_been_at_one_adapter_for_ten_minutes_is_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    busy = iter([0.0, 599.9, 600.0])
    _, looks = watched(start, monkeypatch, lambda: next(busy))
    assert looks.count(1) == 3
    assert "the gate process has been at one adapter for 600 s; it is ended" in caplog.text


def test_a_fault_of_any_kind_at_a_start_does_not_end_the_watch(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start([ENDS, STAYS])
    greet, faults = GateProcess._greet, iter([None, ValueError("odd"), None])

    def greeted(self: GateProcess, process: subprocess.Popen[bytes]) -> GateState:
        if (fault := next(faults)) is not None:
            start_again()
            raise fault
        return greet(self, process)

    def start_again() -> None:
        """The next process is as the one that failed."""
        started.extend(start([STAYS]))

    monkeypatch.setattr(GateProcess, "_greet", greeted)
    process = GateProcess(CONFIG)
    try:
        end = time.monotonic() + 60
        while process.state != SECOND:
            assert time.monotonic() < end and process._watcher.is_alive()
            time.sleep(0.005)
    finally:
        process.close()
    assert started[1].returncode is not None, "the one of the failed start was ended"


def test_nothing_of_a_closed_gate_is_left(start: Start) -> None:
    started = start([STAYS])
    process = GateProcess(CONFIG)
    assert process._watcher.daemon and process._watcher.name == "safelora-gate"
    process.close()
    assert not process._watcher.is_alive()
    child = started[0]
    assert child.returncode is not None
    assert child.stdin is not None and child.stdin.closed
    assert child.stdout is not None and child.stdout.closed


def test_a_process_that_does_not_end_by_itself_is_killed_after_five_seconds() -> None:
    done: list[object] = []

    def wait(timeout: float | None = None) -> None:
        done.append(timeout)
        if timeout is not None:
            raise subprocess.TimeoutExpired("gate", timeout)

    pipe = SimpleNamespace(close=lambda: done.append("closed"))
    process: Any = SimpleNamespace(stdin=pipe, stdout=pipe, wait=wait, kill=lambda: done.append("killed"))
    _end(process)
    assert done == ["closed", 5, "killed", None, "closed"]
