"""Calls to a gate process over its Unix socket."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.gate.protocol import (
    A,
    Admit,
    Call,
    Ensure,
    GateState,
    GetMetrics,
    GetState,
    Judgement,
    Metrics,
    decode_answer,
    encode,
)
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.tenants.quotas import Allowance

_TIMEOUT_SECONDS = 120.0  # for an adapter, and for those that are before it in the queue


class GateClient:
    """Calls to the gate that listens on a socket. Blocking; safe to use from several threads.

    Every call raises GateUnavailable where the gate is down or does not answer in time, MalformedMessage for
    another answer than its own, and what the gate raised, as the same class with the same fields.
    """

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path

    def admit(
        self,
        path: str,
        name: str,
        policy: Mapping[str, Any] | None = None,
        *,
        override: bool = False,
        keep: bool = True,
        allowance: Allowance | None = None,
        signing: SigningRule | None = None,
    ) -> Judgement:
        """Let an adapter folder or archive pass the gate.

        Args:
            path: of the folder or archive.
            name: of the adapter, for its report.
            policy: fields that replace those of the gate's own policy.
            override: whether they may make it less strict.
            keep: whether the content is stored too.
            allowance: what the tenant's quota leaves.
            signing: which signature it has to have.

        Raises:
            AdapterNotFound: there is no such folder or archive.
            PolicyError: values out of range.
            QuotaExceeded: the adapter is over the allowance; nothing was stored.
            StoreUnavailable: the store cannot be written.
        """
        call = Admit(path, name, {**(policy or {})}, override, keep, allowance, signing)
        return self._ask(call, Judgement)

    def ensure(
        self, digest: str, name: str, policy: Mapping[str, Any] | None = None, *, override: bool = False
    ) -> Judgement:
        """The published copy of stored content, made again where it is missing.

        Args:
            digest: of the content.
            name, policy, override: see `admit`.

        Raises:
            PolicyError: values out of range.
            StoreUnavailable: the content is missing or damaged, or the store cannot be written.
        """
        return self._ask(Ensure(digest, name, {**(policy or {})}, override), Judgement)

    def metrics(self, timeout: float = _TIMEOUT_SECONDS) -> str:
        """Exposition text of the gate's counters."""
        return self._ask(GetMetrics(), Metrics, timeout).text

    def state(self, timeout: float = _TIMEOUT_SECONDS) -> GateState:
        """What the gate says of itself."""
        return self._ask(GetState(), GateState, timeout)

    def _ask(self, call: Call, expected: type[A], timeout: float = _TIMEOUT_SECONDS) -> A:
        request = encode(call)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(self.socket_path)
                connection.sendall(request)
                with connection.makefile("rb") as reader:
                    line = reader.readline()
        except TimeoutError as error:
            raise GateUnavailable(
                f"the gate process has not answered for {timeout:g} s: it is at other adapters, or hangs and "
                "is then restarted; try again soon"
            ) from error
        except OSError as error:
            raise GateUnavailable(
                f"the gate process does not answer ({error}); it is being restarted, try again soon"
            ) from error
        if not line.endswith(b"\n"):
            raise GateUnavailable("the gate process ended during the call; try again")
        return decode_answer(line, expected)
