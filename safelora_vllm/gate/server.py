"""The gate process: ``python -m safelora_vllm.gate.server``, settings as one line on stdin.

It says on stdout that it is ready (or why it cannot be), then answers calls on a Unix socket, and ends when
stdin closes, that is, when its worker is gone. `safelora_vllm.gate.protocol` has the messages.
"""

from __future__ import annotations

import logging
import os
import socketserver
import sys
import threading
from pathlib import Path

import torch

from safelora_vllm.errors import (
    GateUnavailable,
    MalformedMessage,
    ProjectorCacheError,
    SafeLoRAError,
)
from safelora_vllm.gate.memory import no_memory
from safelora_vllm.gate.protocol import (
    Answer,
    Failure,
    decode_call,
    decode_config,
    encode,
)
from safelora_vllm.gate.service import GateService
from safelora_vllm.gate.socket_folder import remove

logger = logging.getLogger("vllm.safelora.gate")
_MAX_LINE = 16 * 1024**2  # digests of all that a tenant owns are in it, 67 bytes each
_DEVICE_ERROR: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


class _Handler(socketserver.StreamRequestHandler):
    """Answers each line of one connection."""

    service: GateService

    def handle(self) -> None:
        while line := self.rfile.readline(_MAX_LINE):
            self.wfile.write(self._answer(line))

    def _answer(self, line: bytes) -> bytes:
        try:
            if not line.endswith(b"\n"):
                raise MalformedMessage(f"a call has at most {_MAX_LINE:,} bytes")
            return encode(self.service.answer(decode_call(line)))
        except SafeLoRAError as error:
            return encode(Failure.of(error))
        except Exception as error:  # one request must not end the gate for all others
            logger.exception("the gate failed on a request")
            if isinstance(error, _DEVICE_ERROR):  # so would later calls; a new process has a new context
                os._exit(1)
            return encode(Failure.of(error))


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128  # a full queue refuses a Unix socket's client at once


def _say(message: Answer | Failure) -> None:
    """One line to the worker that started this process."""
    sys.stdout.buffer.write(encode(message))
    sys.stdout.buffer.flush()


def main() -> int:
    """Entry point of the process. Exit code 0 when stdin closes, 1 when it cannot start."""
    logging.basicConfig(
        format="%(levelname)s %(asctime)s [safelora gate] %(message)s",
        datefmt="%m-%d %H:%M:%S",  # as in vLLM's lines
        level=logging.INFO,
    )
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not the few cores of the worker's thread
    torch.set_num_threads(1)  # small products: a second thread would wait for a core that serves
    try:
        config = decode_config(sys.stdin.buffer.readline())
        os.nice(config.niceness)
        service = GateService(config)
    except SafeLoRAError as error:
        _say(Failure.of(error))
        return 1
    except torch.OutOfMemoryError:
        _say(Failure.of(GateUnavailable(no_memory(config.device, "its projectors and its work"))))
        return 1
    except (OSError, RuntimeError) as error:  # while it reads the cache, or puts it on the device
        _say(Failure.of(ProjectorCacheError(str(error))))
        return 1
    socket_path = Path(config.socket)
    socket_path.unlink(missing_ok=True)
    handler = type("Handler", (_Handler,), {"service": service})
    with _Server(str(socket_path), handler) as server:
        for work in (server.serve_forever, service.keep_clean):
            threading.Thread(target=work, daemon=True).start()
        _say(service.state())
        sys.stdin.buffer.read()  # returns when the worker closes it or is gone
        server.shutdown()
    remove(socket_path.parent)  # the worker may have been killed
    return 0


if __name__ == "__main__":
    sys.exit(main())
