"""Sees that the store's names have changed, whoever changed them.

Two mechanisms see changes. Each request asks the kernel's queue (`StoreWatch`), so that what another API
server of this machine has answered is in force. A look every 2 s sees all else: other hosts, and what the
queue has missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from safelora_vllm.files import settled
from safelora_vllm.integration.server.published_copies import Copies, Copy
from safelora_vllm.integration.server.registry import Registry
from safelora_vllm.integration.server.store_watch import StoreWatch
from safelora_vllm.store import AdapterRecord, NameStore, Version
from safelora_vllm.tenants.keyless import NO_KEYS_FILE, is_a_tenants

logger = logging.getLogger("vllm.safelora.reconcile")
# A request waits this long for a change that was seen. Where the store hangs, the next ones do not wait.
_PATIENCE_SECONDS = 1.0
_LOOK_SECONDS = 2.0
TAKEN = "the server itself has that name"


class StoreSync:
    """Compares the store's names with the registry.

    Attributes:
        watch: tells of changes by this machine, if there is one.
        apart: whether tenants are kept apart, by a keys file.
        passed_over: the store's names that are not served, and why: the server itself has them, or they are
            tenants' and it does not keep these apart.
    """

    def __init__(
        self,
        names: NameStore,
        copies: Copies,
        registry: Registry,
        is_base_model: Callable[[str], bool],
        drop: Callable[[str], None],
        change: Callable[[AdapterRecord, Copy | None], None],
    ) -> None:
        """drop: for a name that is gone. change: for a record that is new, with its published copy."""
        self._names, self._copies, self._registry = names, copies, registry
        self._is_base_model, self._drop, self._change = is_base_model, drop, change
        self.watch: StoreWatch | None = None
        self.apart = False
        self.passed_over: dict[str, str] = {}
        self._stamp = -1
        self._syncing: asyncio.Task[None] | None = None
        self._sync_again = self._behind = self._store_hangs = False

    async def refresh(self) -> None:
        """`sync`, if another process of this machine has changed the store's names. For each request.

        A store that hangs keeps requests for `_PATIENCE_SECONDS` once, and then none until it answers: what
        is known of it stays in force.
        """
        if self._behind or (self.watch is not None and self.watch.changed()):
            self._start_sync()
        if self._syncing is not None and not self._syncing.done() and not self._store_hangs:
            done, _ = await asyncio.wait({self._syncing}, timeout=_PATIENCE_SECONDS)
            if not done:
                self._store_hangs = True
                logger.error("the adapter store does not answer; what is known of it stays in force")

    async def sync(self) -> None:
        """Look at the store's names now, and act on all that has changed.

        Raises:
            SafeLoRAError, OSError: the store cannot be read.
        """
        await asyncio.shield(self._start_sync())

    async def catch_up(self) -> None:
        """`sync` if the folder of the store's names has changed, whoever did it."""
        stamp = await asyncio.to_thread(self._names.stamp)
        if stamp != self._stamp:
            await self.sync()
            self._stamp = settled(stamp)

    async def follow_bucket(self) -> None:
        """Without end: take over what others wrote into the store's bucket. It may take long."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await asyncio.to_thread(self._names.look)
            except Exception as error:  # whatever it is, the next look may succeed
                logger.warning("the store's bucket: %s: %s", type(error).__name__, error)

    def read_changes(self) -> tuple[list[tuple[AdapterRecord, Copy | None]], dict[str, AdapterRecord]]:
        """Records that are not in the registry as they are, each with its copy if it is published; all."""
        records = self._names.all()
        passed_over = {name: why for name, record in records.items() if (why := self._why_not(record))}
        for name, why in passed_over.items():
            live = records.pop(name).live
            if name not in self.passed_over:
                about = {"adapter": name, "version": live.version}
                logger.error("the store's adapter %r is not served: %s", name, why, extra=about)
        self.passed_over = passed_over
        known = {name: entry.version for name, entry in list(self._registry.items())}
        return [
            (record, self._copies.find(name, record.live))
            for name, record in records.items()
            if self._is_news(name, known.get(name), record.live)
        ], records

    def _why_not(self, record: AdapterRecord) -> str:
        """Why a name of the store is not served here, whatever it has; empty where nothing is in its way."""
        entry = self._registry.get(record.name)
        if (entry and entry.folder) or self._is_base_model(record.name):
            return TAKEN  # the server's own command line goes first
        return NO_KEYS_FILE if not self.apart and is_a_tenants(record) else ""

    def _start_sync(self) -> asyncio.Task[None]:
        """The task that ends when a look at the store that begins now, or later, has been acted on."""
        self._sync_again, self._behind = True, False
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._sync())
            self._syncing.add_done_callback(self._synced)
        return self._syncing

    def _synced(self, task: asyncio.Task[None]) -> None:
        self._store_hangs = False
        if not task.cancelled() and (error := task.exception()):
            self._behind = True
            logger.error("the adapter store cannot be read: %s", error)

    async def _sync(self) -> None:
        while self._sync_again:
            self._sync_again = False
            changed, records = await asyncio.to_thread(self.read_changes)
            for name in [n for n, entry in self._registry.items() if entry.version and n not in records]:
                self._drop(name)
            for record, copy in changed:
                self._change(record, copy)

    def _is_news(self, name: str, known: Version | None, live: Version) -> bool:
        """Whether a record says something new. What was decided by other rules is another host's."""
        if known == live:
            return False
        if known is None or not same_content(known, live):
            return True
        today = self._copies.ruleset(name)
        return live.ruleset_digest == today or known.ruleset_digest != today


def same_content(one: Version, other: Version) -> bool:
    """Whether one was made of the other by judging it anew, if at all."""
    return one.unjudged == other.unjudged
