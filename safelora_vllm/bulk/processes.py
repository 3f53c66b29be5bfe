"""Projecting adapters in several processes of this machine. One that dies is noticed and replaced."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from typing import Any

from safelora_vllm.bulk.inputs import AdapterInput
from safelora_vllm.bulk.job import Job, Outcome, not_judged
from safelora_vllm.bulk.messages import line, outcome_of
from safelora_vllm.errors import UsageError

ATTEMPTS = 2
_END_SECONDS = 5.0


def in_processes(job: Job, adapters: Sequence[AdapterInput], jobs: int) -> Generator[Outcome]:
    """The outcomes, as they come. An adapter whose process dies is given to one more.

    Raises:
        SafeLoRAError: an error that is no adapter's. The adapters before it are recorded.
    """
    waiting: queue.SimpleQueue[AdapterInput] = queue.SimpleQueue()
    for adapter in adapters:
        waiting.put(adapter)
    results: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    lanes = [_Lane(job, waiting, results) for _ in range(min(jobs, len(adapters)))]
    try:
        for lane in lanes:
            lane.start()
        for _ in adapters:
            if isinstance(result := results.get(), BaseException):
                raise result
            yield result
    finally:
        for lane in lanes:
            lane.end()


class _Lane(threading.Thread):
    """Gives adapters to one process after the other, which does one at a time."""

    def __init__(
        self,
        job: Job,
        waiting: queue.SimpleQueue[AdapterInput],
        results: queue.SimpleQueue[Outcome | BaseException],
    ) -> None:
        super().__init__(name="safelora-project", daemon=True)
        self._job, self._waiting, self._results = job, waiting, results
        self._process: _Process | None = None
        self._ending = False

    def run(self) -> None:
        try:
            while not self._ending:
                self._results.put(self._outcome(self._waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            self._results.put(error)
        finally:
            if self._process is not None:
                self._process.end()

    def end(self) -> None:
        """End the process at once, if it is at work."""
        self._ending = True
        if self._process is not None:
            self._process.kill()
        if self.is_alive():
            self.join()

    def _outcome(self, adapter: AdapterInput) -> Outcome:
        code: int | None = None
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._process = _started(self._job)
            if self._ending:
                break
            if (answer := self._process.ask(line(adapter))) is not None:
                return outcome_of(answer)
            code, self._process = self._process.end(), None
        cause = f"its process ended {ATTEMPTS} times, last with code {code}; look at the memory and the log"
        return not_judged(adapter, cause)


class _Process:
    """A worker process and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "safelora_vllm.bulk.worker_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # where a library prints, it must not stand among results
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._stream = self._socket.makefile("rb")

    def ask(self, message: bytes) -> dict[str, Any] | None:
        """The answer to a line, None where the process has ended."""
        try:
            self._socket.sendall(message, socket.MSG_NOSIGNAL)  # commands take SIGPIPE as their end
            text = self._stream.readline()
            return dict(json.loads(text)) if text.endswith(b"\n") else None
        except OSError:
            return None

    def kill(self) -> None:
        """End it now, whatever it does."""
        self._process.kill()

    def end(self) -> int:
        """Close the socket, wait for the process, and return its exit code."""
        self._stream.close()
        self._socket.close()
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _started(job: Job) -> _Process:
    """A process that has its projectors in memory.

    Raises:
        SafeLoRAError: it cannot start.
    """
    code = 0
    for _ in range(ATTEMPTS):
        try:
            process = _Process()
        except OSError as error:
            raise UsageError(f"a process cannot be started ({error}); give fewer `jobs`") from error
        if (greeting := process.ask(line(job))) is not None:
            if "error" in greeting:
                process.end()
                outcome_of(greeting)
            return process
        code = process.end()
    raise UsageError(
        f"a process ended with code {code} before it had its projectors in memory. Give fewer `jobs`, or a "
        "smaller `projector_memory`"
    )
