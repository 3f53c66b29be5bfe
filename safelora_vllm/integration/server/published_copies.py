"""Published copies, as an API server asks the gate for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

from safelora_vllm.files import FileState
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore, Version

P = ParamSpec("P")
R = TypeVar("R")
_GATE_CALLS = 32  # at once; the gate itself does one adapter at a time


class Copy(NamedTuple):
    """A published copy: its key, the gate's report, and the states of its files."""

    key: str
    report: Report
    state: tuple[FileState, ...]


class Copies:
    """What is published in the store, and the gate that publishes more.

    Attributes:
        gate: its client.
        state: the gate's `state` answer.
    """

    def __init__(self, gate: GateClient, state: GateState, published: PublishedStore) -> None:
        self.gate, self.state, self._published = gate, state, published
        self._threads = ThreadPoolExecutor(_GATE_CALLS, thread_name_prefix="safelora-gate")

    async def ask(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """A call of ``gate`` that may take long, in threads of its own: asyncio's few are for the short ones.

        Raises:
            GateUnavailable: the gate is down or took too long. SafeLoRAError: whatever it raised.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*arguments, **named))

    def find(self, version: Version) -> Copy | None:
        """The published copy of a stored version, if there is one by this gate's rules. Reads the store."""
        if version.ruleset_digest != self.state.ruleset_digest:  # other projectors or another policy
            return None
        if version.override and not self._published.has_override(version.key):
            return None  # an older release made it: the gate adds that when it is asked for it
        report = self._published.report(version.key)
        return None if report is None else Copy(version.key, report, self.file_states(version.key))

    async def make(self, entry: Entry) -> Copy:
        """The published copy that the gate finds or makes.

        Raises:
            SafeLoRAError: it refuses, or cannot.
        """
        if version := entry.version:
            judged = await self.ask(
                self.gate.ensure, version.digest, entry.name, version.policy, override=version.override
            )
        else:
            judged = await self.ask(self.gate.admit, str(entry.folder), entry.name, keep=False)
        key = judged.accepted_key()
        return Copy(key, judged.report, await asyncio.to_thread(self.file_states, key))

    def file_states(self, key: str) -> tuple[FileState, ...]:
        """States of a published copy's files; none where they cannot be seen. Reads the store."""
        try:
            return self._published.state(key)
        except OSError:
            return ()
