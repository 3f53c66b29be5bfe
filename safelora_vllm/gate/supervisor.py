"""Starting a gate process and keeping it alive, for the worker of a host that owns it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateConfig, GateState, decode_answer, encode

logger = logging.getLogger("vllm.safelora.gate")
_RESTART_SECONDS = 1.0
_LOOK_SECONDS = 5.0  # from one look at the gate to the next
_ANSWER_SECONDS = 15.0  # what it may take to say how it is, on a machine with no processor to spare
_SILENCES = 2  # looks in a row that it did not answer
_ADAPTER_SECONDS = 600.0  # what it may take with one adapter; callers wait for 120
# Beginnings of variables that are not inherited. Some would make the child write into vLLM's metrics, or load
# its plugins. The others hold secrets: the child parses what strangers send, and needs none of them.
_NOT_INHERITED = (
    "PROMETHEUS_MULTIPROC_DIR", "VLLM_PLUGINS", "SAFELORA_ADMIN_API_KEY", "SAFELORA_METRICS_KEY",
    "SAFELORA_KEY", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_", "GOOGLE_", "AZURE_",
)  # fmt: skip


class GateProcess:
    """Owns a gate process: starts it, and starts it again when it dies or hangs. For the worker of a host.

    environment: variables that it gets besides this process's own.

    Attributes:
        restarts: how often it was started again.
    """

    def __init__(self, config: GateConfig, environment: Mapping[str, str] | None = None) -> None:
        self._config, self._environment = config, dict(environment or {})
        self._closing = threading.Event()
        self.restarts = 0
        self.state = self._start()
        self._watcher = threading.Thread(target=self._watch, name="safelora-gate", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """End the process and wait for it."""
        self._closing.set()
        _end(self._process)  # also one that the watcher is just starting: it then waits for nothing
        self._watcher.join()

    def _start(self) -> GateState:
        """Start the process and wait until it is ready.

        Raises:
            SafeLoRAError: it cannot start, with its own words.
        """
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "safelora_vllm.gate.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_inherited() | self._environment,
            )
        except OSError as error:
            raise GateUnavailable(f"the gate process cannot be started ({error})") from error
        self._process = process
        try:
            if self._closing.is_set():  # set before `close` looked for the process to end
                raise GateUnavailable("the gate is being closed")
            return self._greet(process)
        except BaseException:
            _end(process)
            raise

    def _greet(self, process: subprocess.Popen[bytes]) -> GateState:
        """Give a new process its settings; what it says of itself when it is ready."""
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(OSError, ValueError):  # the pipes are closed where `close` was first
            process.stdin.write(encode(self._config))
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            _end(process)
            raise GateUnavailable(f"the gate process ended at its start with code {process.returncode}")
        return decode_answer(line, GateState)

    def _watch(self) -> None:
        while not self._closing.is_set():
            self._wait_for_end()
            code = self._process.returncode
            _end(self._process)
            while not self._closing.wait(_RESTART_SECONDS):
                logger.error("the gate process ended with code %s; starting it again", code)
                try:
                    self.state = self._start()
                    self.restarts += 1
                    break
                except Exception as error:  # whatever it is, without this thread there is no gate
                    logger.error("the gate process cannot start: %s", error)

    def _wait_for_end(self) -> None:
        """Until the process is gone. One that hangs, in a parser or for want of memory, is ended."""
        client, silences = GateClient(self._config.socket), 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_LOOK_SECONDS)
                return
            try:
                busy = client.state(timeout=_ANSWER_SECONDS).busy_seconds
                silences = 0
                if busy < _ADAPTER_SECONDS:
                    continue
                logger.error("the gate process has been at one adapter for %.0f s; it is ended", busy)
            except Exception as error:  # whatever it is, without this thread there is no gate
                silences += 1
                if silences < _SILENCES:
                    continue
                logger.error("the gate process is ended: %s", error)
            self._process.kill()


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
