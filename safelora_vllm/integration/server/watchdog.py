"""Notices workers that lost their guard and published copies that were damaged, and stops serving them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

from safelora_vllm.errors import GuardError, SafeLoRAError, StoreUnavailable
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.server.engine import Pool, ask_workers
from safelora_vllm.integration.server.published_copies import Copies
from safelora_vllm.integration.server.registry import Entry, Registry

logger = logging.getLogger("vllm.safelora.watchdog")
# A vLLM worker that was asked something spins for a second in case there is more: not at each look.
_ATTEST_LOOKS = 15
_ALERT_LOOKS = 30  # asked at each of these, after a published copy changed


class Watchdog:
    """Looks at what one API server process serves.

    put: changes an entry of the registry.

    Attributes:
        workers: how many are guarded and how many are not.
        pools: what each worker has loaded, as it said last.
        also: what else is brought up to date at each look.
        repair: is told each adapter whose published copy changed.
        withdrawn: how often an adapter was withdrawn: a copy was not whole, an exam was failed or too long
            without a score, or a worker not guarded.
    """

    def __init__(
        self, registry: Registry, copies: Copies, pool: Pool, put: Callable[[Entry], None], guarded: int
    ) -> None:
        self.pools: list[PoolState] = []
        self.withdrawn = 0
        self.also: Callable[[], None] = lambda: None
        self.repair: Callable[[Entry], None] = lambda _: None
        self._registry, self._copies, self._pool, self._put = registry, copies, pool, put
        self.workers = _states(guarded)
        self._looks, self._alert = itertools.count(1), 0

    async def look(self) -> None:
        """Withdraw what is not whole any more. Workers are not asked each time, unless a copy has changed."""
        try:
            self.also()
        except Exception as error:  # whatever it is: it must not keep an unguarded worker's adapters served
            logger.warning("beside the watchdog's look: %s: %s", type(error).__name__, error)
        if await self._copies_changed():
            self._alert = _ALERT_LOOKS
        if next(self._looks) % _ATTEST_LOOKS == 1 or self._alert:
            self._alert = max(0, self._alert - 1)
            await self._attest()

    async def _copies_changed(self) -> bool:
        """Whether the files of a served adapter are not those of the last time."""
        served = {name: entry for name, entry in self._registry.items() if entry.served}
        keys = {entry.served.key for entry in served.values() if entry.served}
        states = await asyncio.to_thread(lambda: {key: self._copies.file_states(key) for key in keys})
        changed = False
        for name, entry in served.items():
            if entry.served is None or self._registry.get(name) is not entry:
                continue
            state = states[key := entry.served.key]
            if state == entry.served.copy:
                continue
            changed = True
            policy = entry.served.report.policy
            still = await asyncio.to_thread(self._copies.exam.passed, name, key, policy, entry.exam_override)
            if self._registry.get(name) is not entry:
                continue
            if still:
                self._registry[name] = replace(entry, served=replace(entry.served, copy=state))
                self.repair(self._registry[name])
            else:
                self.withdraw(
                    entry, "its copy is not the one that was examined", self._copies.exam.pending(name)
                )
        return changed

    async def _attest(self) -> None:
        """Ask every worker whether it is guarded, and which copies it could not read."""
        try:
            answers = await ask_workers(self._pool.engine_client)
        except GuardError as error:
            self.workers, self.pools = {"guarded": 0, "unguarded": 1}, []
            self._withdraw(None, error)
            return
        self.workers, self.pools = _states(len(answers)), [answer.pool for answer in answers]
        self._withdraw({path for answer in answers for path in answer.lost})

    def _withdraw(self, lost: set[str] | None, error: SafeLoRAError | None = None) -> None:
        """Stop serving adapters under these paths, or all of them, until their copies are whole again."""
        self._pool.mark_lost(lost or set())
        found = {
            name: entry
            for name, entry in self._registry.items()
            if entry.served and (lost is None or entry.served.request.lora_path in lost)
        }
        for name, entry in found.items():
            assert entry.served is not None
            self._pool.mark_lost({entry.served.request.lora_path})
            damaged = StoreUnavailable(f"the published copy of {name} was damaged; it is being made again")
            self.withdraw(entry, "its copy in the pool is not whole", error or damaged)

    def withdraw(self, entry: Entry, why: str, problem: SafeLoRAError) -> None:
        """Stop serving an adapter. why: for the log. problem: what its callers are told."""
        logger.error("adapter %r is withdrawn: %s", entry.name, why, extra=entry.log_fields)
        self.withdrawn += 1
        self._put(replace(entry, served=None, problem=problem))


def _states(guarded: int) -> dict[str, int]:
    return {"guarded": guarded, "unguarded": 0}
