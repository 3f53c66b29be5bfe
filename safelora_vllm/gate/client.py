"""Calls to a gate process over its Unix socket."""

from __future__ import annotations

import json
import socket
from typing import Any

from safelora_vllm import errors
from safelora_vllm.errors import GateUnavailable, SafeLoRAError


class GateClient:
    """Calls to the gate that listens on a socket. Blocking; safe to use from several threads."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path

    def call(self, operation: str, timeout: float = 120.0, **arguments: Any) -> Any:
        """One operation of `safelora_vllm.gate.server.GateService`.

        Raises:
            GateUnavailable: the gate is down or did not answer within ``timeout`` seconds.
            SafeLoRAError: whatever the operation raised over there, as the same class.
        """
        request = json.dumps({"op": operation, **arguments}).encode() + b"\n"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(self.socket_path)
                connection.sendall(request)
                with connection.makefile("rb") as reader:
                    line = reader.readline()
        except OSError as error:
            raise GateUnavailable(
                f"the gate process does not answer ({error}); it is restarted, try again"
            ) from error
        if not line.endswith(b"\n"):
            raise GateUnavailable("the gate process ended during the call; try again")
        return result(line)


def result(line: str | bytes) -> Any:
    answer = json.loads(line)
    if "error" in answer:
        kind = getattr(errors, answer["type"], SafeLoRAError)
        raise kind(answer["error"])
    return answer["result"]
