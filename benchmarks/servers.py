"""A real server, guarded or not, with the few calls that hot_load.py measures. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_OPTIONS = ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "2048", "--max-lora-rank", "16"]
_OPTIONS += ["--max-loras", "2", "--max-cpu-loras", "16", "--served-model-name", "aligned"]
_START_SECONDS = 600.0
SAFE_LORA = ("--method=safe-lora", "--select=all")


@dataclass(frozen=True)
class Server:
    """A server that answers on a port of this machine."""

    port: int
    key: str
    process: subprocess.Popen[bytes]

    def load(self, name: str, folder: Path) -> float:
        """Load an adapter; seconds from the request to the answer."""
        return self._post("load", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> float:
        """Forget an adapter."""
        return self._post("unload", {"lora_name": name})

    def tokens(self, prompt: str, count: int) -> Generator[float, None, None]:
        """The moment at which each token of a completion by the model without an adapter arrives.

        Closing the iterator ends the request.
        """
        body = {"model": "aligned", "prompt": prompt, "max_tokens": count, "stream": True}
        connection, answer = self._request("/v1/completions", body | {"ignore_eos": True, "temperature": 0})
        try:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield time.perf_counter()
        finally:
            connection.close()

    def metrics(self) -> str:
        """The text of ``/metrics``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()

    def _post(self, verb: str, body: dict[str, str]) -> float:
        start = time.perf_counter()
        connection, answer = self._request(f"/v1/{verb}_lora_adapter", body)
        answer.read()
        seconds = time.perf_counter() - start
        connection.close()
        return seconds

    def _request(
        self, path: str, body: Mapping[str, object]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection.request("POST", path, json.dumps(dict(body)), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {answer.read().decode():.500}")
        return connection, answer


@contextmanager
def running(
    kind: str, model: Path, projectors: Path, scratch: Path, options: list[str],
    guarded: Sequence[str] = SAFE_LORA,
) -> Iterator[Server]:  # fmt: skip
    """A ``guarded`` or ``unguarded`` server of ``model``, started now and stopped at the end.

    The guarded one has an empty adapter store in ``scratch``, and more options: by default it projects every
    module with Safe LoRA.
    """
    port, key = _free_port(), secrets.token_hex(16)
    common = [*_OPTIONS, "--port", str(port), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAFELORA_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if kind == "guarded":
        environment["SAFELORA_ADMIN_API_KEY"] = key
        environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
        program = [sys.executable, "-m", "safelora_vllm.cli", "serve", str(model)]
        program += ["--projectors", str(projectors), "--adapter-store", str(scratch / "store")]
        program += guarded
    else:
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_PLUGINS": ""}
        program = [sys.executable, str(Path(__file__).with_name("unguarded.py")), str(model), "--enable-lora"]
    log = scratch / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, *common], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield Server(port, key, process)
    finally:
        stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()
    raise RuntimeError(f"the server did not start; the end of its log:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes], patience: float = 30.0) -> None:
    """End the server's own session, politely for some seconds: it has engine and gate processes.

    What does not listen, or has lost its parent, is killed.
    """
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
