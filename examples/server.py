"""Start a vLLM server as a child process, wait until it answers, and stop it again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ADMIN_KEY = "an-admin-key-for-this-machine-only"
# Small and quick to start; a real deployment sets none of these. A CPU without AVX-512 multiplies bfloat16
# several times as slowly as float32, and in float32 the answers do not depend on what else is in a batch.
SMALL = [
    "--host=127.0.0.1", "--dtype=float32", "--enforce-eager", "--max-model-len=2048", "--max-num-seqs=32",
    "--served-model-name=aligned",
]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


class ServerDied(RuntimeError):
    """The server ended before it answered; the message has the end of its log."""


@contextmanager
def running(
    command: list[str], log: Path, env: dict[str, str] | None = None, seconds: float = 400.0
) -> Iterator[Server]:
    """Run ``command`` with ``--port`` added until the block ends.

    Raises:
        ServerDied: it ended, or did not answer /health within ``seconds``.
    """
    port = free_port()
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "SAFELORA_ADMIN_API_KEY": ADMIN_KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--port={port}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**settings, **os.environ, **(env or {})},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server, seconds)
        yield server
    finally:
        stop(process)


def guarded(model: Path, projectors: Path, store: Path, *options: str) -> list[str]:
    """The command of a guarded server."""
    return [
        str(Path(sys.executable).with_name("safelora-vllm")), "serve", str(model),
        f"--projectors={projectors}", f"--adapter-store={store}", *SMALL, *options,
    ]  # fmt: skip


def plain(model: Path, *options: str) -> list[str]:
    """The command of vLLM's own server, as `vllm serve` would start it."""
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, f"--model={model}", *SMALL, *options]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and everything it started, politely at first."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
    process.wait()


def _wait(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerDied(f"exit code {server.process.returncode}:\n{_tail(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ServerDied(f"no answer within {seconds:g} s:\n{_tail(server.log)}")


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
