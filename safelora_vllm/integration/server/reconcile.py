"""Keeps the registry in step with the adapter store and with what the workers say.

The store's names are what shall be served; this brings it about in one API server process, whoever
changed them: this process, another API server, another host, or an operator's command. An adapter is given to
vLLM under the path ``safelora://KEY``: the key is a digest of content, projectors and policy, so that
prefix-cache blocks of other weights can never be reused, a server without the plugin cannot load it, and
``/v1/models`` shows no folder to anyone.

Two mechanisms see changes. Each request asks the kernel's queue (`StoreWatch`), so that what another API
server of this machine has answered is in force. A look every 2 s sees all else: other hosts, damaged copies,
workers that lost their guard, and what could not be served before.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import (
    AdapterRefused,
    GuardError,
    SafeLoRAError,
    StoreUnavailable,
    Unavailable,
    fresh_copy,
)
from safelora_vllm.files import FileState, make_folder
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.adapter_uri import published_key
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.engine import IDS_EACH, Pool, ask_workers
from safelora_vllm.integration.server.metrics import AdapterCollector
from safelora_vllm.integration.server.registry import Entry, Registry, Served, being_prepared
from safelora_vllm.integration.server.store_watch import StoreWatch
from safelora_vllm.integration.server.visibility import CallersRequests
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version

logger = logging.getLogger("vllm.safelora.reconcile")
P = ParamSpec("P")
R = TypeVar("R")
_STATIC_IDS = 2**19  # below the store's
_HEARTBEAT_SECONDS = 2.0
# A vLLM worker that was asked something spins for a second in case there is more: it is not asked each time.
_ATTEST_BEATS = 15
_ALERT_BEATS = 30  # asked at each, after a published copy changed
_GATE_CALLS = 32  # at once; the gate itself does one adapter at a time
_SETTLED_NS = 50_000_000
# A request waits this long for a change that was seen. Where the store hangs, the next ones do not wait.
_PATIENCE_SECONDS = 1.0


class Copy(NamedTuple):
    """A published copy: its key, the gate's report, and the states of its files."""

    key: str
    report: Report
    state: tuple[FileState, ...]


class Reconciler:
    """The adapters of one API server process.

    pool: loads and frees weights. state: the gate's `state` answer. is_base_model: whether a name is one of
    the model's own. workers: how many are guarded and how many are not.
    """

    def __init__(
        self,
        pool: Pool,
        gate: GateClient,
        state: GateState,
        workers: dict[str, int],
        published: PublishedStore,
        is_base_model: Callable[[str], bool],
    ) -> None:
        self.registry: Registry = {}
        self.pool, self.gate, self.state, self.workers = pool, gate, state, workers
        self.published, self.is_base_model = published, is_base_model
        self._passed_over: set[str] = set()
        self._alert, self._stamp = 0, -1
        self._watch: StoreWatch | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._sync_again = self._behind = self._store_hangs = False
        self._preparing = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._gate_threads = ThreadPoolExecutor(_GATE_CALLS, thread_name_prefix="safelora-gate")

    @classmethod
    async def start(cls, engine_client: Any, models: Any) -> Reconciler:
        """Ask every worker whether it is guarded, then serve ``--lora-modules`` and the store's names.

        Raises:
            GuardError: a worker is not guarded, or the workers do not agree on their rules.
        """
        answers = await ask_workers(engine_client)
        gate = GateClient(answers[0].socket)
        state = await asyncio.to_thread(gate.state)
        root = Path(state.store)
        pool = Pool(engine_client, NameStore(root))
        made = cls(pool, gate, state, _states(answers), PublishedStore(root), models.is_base_model)
        given = seams.replace_map(models, CallersRequests(made.registry))
        for position, request in enumerate(given.values()):
            await made._adopt_static(request, _STATIC_IDS + IDS_EACH * position)
        await asyncio.to_thread(make_folder, made.names.folder)
        made._watch = StoreWatch(made.names.folder)
        await made.sync()
        made._spawn(made._heartbeat())
        return made

    async def stop(self) -> None:
        """End all work in the background. What is served stays served."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._watch is not None:
            self._watch.close()

    @property
    def names(self) -> NameStore:
        """What shall be served."""
        return self.pool.names

    async def refresh(self) -> None:
        """`sync`, if another process of this machine has changed the store's names. For each request.

        A store that hangs keeps requests for `_PATIENCE_SECONDS` once, and then none until it answers: what
        is known of it stays in force.
        """
        if self._behind or (self._watch is not None and self._watch.changed()):
            self._start_sync()
        if self._syncing is not None and not self._syncing.done() and not self._store_hangs:
            done, _ = await asyncio.wait({self._syncing}, timeout=_PATIENCE_SECONDS)
            if not done:
                self._store_hangs = True
                logger.error("the adapter store does not answer; what is known of it stays in force")

    async def sync(self) -> None:
        """Serve what the store's names say now, and nothing else.

        Raises:
            SafeLoRAError, OSError: the store cannot be read.
        """
        await asyncio.shield(self._start_sync())

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
            changed, records = await asyncio.to_thread(self._read_changes)
            for name in [n for n, entry in self.registry.items() if entry.version and n not in records]:
                self._drop(name)
            for record, copy in changed:
                entry = Entry(record.name, record.live.id, record.live)
                if copy is not None:
                    self._serve(entry, copy)
                else:
                    self._put(replace(entry, problem=being_prepared(record.name)))
                    self._spawn(self._prepare(record.name))

    async def ask_gate(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """A call of ``gate`` that may take long, in threads of its own: asyncio's few are for the short ones.

        Raises:
            GateUnavailable: the gate is down or took too long. SafeLoRAError: whatever it raised.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._gate_threads, lambda: call(*arguments, **named))

    def metrics(self) -> str:
        """Exposition text: the gate's counters (empty while it is down) and the served adapters."""
        collector = AdapterCollector(lambda: list(self.registry.values()), lambda: self.workers)
        try:
            counters = self.gate.metrics(timeout=5.0)
        except SafeLoRAError as error:
            logger.warning("no gate metrics: %s", error)
            counters = ""
        return counters + collector.expose()

    def _read_changes(self) -> tuple[list[tuple[AdapterRecord, Copy | None]], dict[str, AdapterRecord]]:
        """Records that are not in the registry as they are, each with its copy if it is published; all."""
        records = self.names.all()
        taken = {name for name, entry in list(self.registry.items()) if entry.folder}
        for name in [name for name in records if name in taken or self.is_base_model(name)]:
            del records[name]  # the server's own command line goes first
            if name not in self._passed_over:
                self._passed_over.add(name)
                logger.error("the store's adapter %r is not served: the server itself has that name", name)
        known = {name: entry.version for name, entry in list(self.registry.items())}
        return [
            (record, self._published_copy(record.live))
            for name, record in records.items()
            if known.get(name) != record.live
        ], records

    def _published_copy(self, version: Version) -> Copy | None:
        if version.ruleset_digest != self.state.ruleset_digest:  # other projectors or another policy
            return None
        if version.override and not self.published.has_override(version.key):
            return None  # an older release made it: the gate adds that when it is asked for it
        report = self.published.report(version.key)
        return None if report is None else Copy(version.key, report, self._state(version.key))

    def _serve(self, entry: Entry, copy: Copy) -> None:
        """Serve a published copy under a name."""
        try:
            request = self.pool.request(entry.name, copy.key, entry.first_id)
        except Unavailable as error:
            return self._put(replace(entry, served=None, problem=fresh_copy(error)))
        served = Served(request, copy.report.named(entry.name), copy.state)
        self._put(replace(entry, served=served, problem=None))

    def _put(self, entry: Entry) -> None:
        """Change what is known of a name. Weights that it had before are freed when nobody uses them."""
        before = self.registry.get(entry.name)
        self.registry[entry.name] = entry
        if before is not None and before.served is not None:
            kept = entry.served is not None and _same(entry.served.request, before.served.request)
            if not kept:
                self._release(before.served.request)

    def _drop(self, name: str) -> None:
        entry = self.registry.pop(name)
        if entry.served is not None:
            self._release(entry.served.request)

    async def _prepare(self, name: str) -> None:
        """Let the gate find or make the published copy of a name again, then serve it."""
        async with self._preparing:
            entry = self.registry.get(name)
            if entry is None or entry.served is not None:
                return
            try:
                copy = await self._judged(entry)
            except SafeLoRAError as error:
                logger.error("adapter %r cannot be served now: %s", name, error)
                if self.registry.get(name) is entry:
                    self._put(replace(entry, problem=fresh_copy(error)))
                return
            if self.registry.get(name) is entry:  # nobody changed or removed it meanwhile
                self._serve(entry, copy)

    async def _judged(self, entry: Entry) -> Copy:
        """The published copy that the gate finds or makes.

        Raises:
            SafeLoRAError: it refuses, or cannot.
        """
        if version := entry.version:
            judged = await self.ask_gate(
                self.gate.ensure, version.digest, entry.name, version.policy, override=version.override
            )
        else:
            judged = await self.ask_gate(self.gate.admit, str(entry.folder), entry.name, keep=False)
        key = judged.accepted_key()
        return Copy(key, judged.report, await asyncio.to_thread(self._state, key))

    async def _adopt_static(self, request: LoRARequest, first_id: int) -> None:
        """Serve an adapter of ``--lora-modules`` from its published copy instead of its folder.

        Its weights already passed the gate in the worker, so this finds them published.
        """
        name, path = request.lora_name, Path(request.lora_path)
        if not path.exists():
            raise GuardError(f"--lora-modules {name}: there is no {path}")
        self._put(Entry(name, first_id, folder=path, problem=being_prepared(name)))
        await self._prepare(name)
        await self.pool.load(self.registry[name].current().request)
        await self.pool.engine_client.remove_lora(request.lora_int_id)

    def _release(self, request: LoRARequest) -> None:
        self._spawn(self.pool.release(request, self._wanted))

    def _wanted(self, request: LoRARequest) -> bool:
        """Whether this very version is served."""
        entry = self.registry.get(request.lora_name)
        return entry is not None and entry.served is not None and _same(entry.served.request, request)

    async def _heartbeat(self) -> None:
        """Notice workers that lost their guard, published copies that are gone, and missed changes."""
        for beat in itertools.count(1):
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                if await self._copies_changed():
                    self._alert = _ALERT_BEATS
                if self._alert or beat % _ATTEST_BEATS == 0:
                    self._alert = max(0, self._alert - 1)
                    await self._attest()
                await self._catch_up()
                self._prepare_again()
            except Exception as error:  # whatever it is, the next beat may succeed
                logger.warning("heartbeat: %s: %s", type(error).__name__, error)

    async def _catch_up(self) -> None:
        """`sync` if the folder of the store's names has changed, whoever did it."""
        stamp = await asyncio.to_thread(self.names.stamp)
        if stamp != self._stamp:
            await self.sync()
            # A folder's time stamp is as coarse as the kernel's clock tick: a second change may not show.
            self._stamp = stamp if time.time_ns() - stamp > _SETTLED_NS else -1

    async def _copies_changed(self) -> bool:
        """Whether the files of a served adapter are not those of the last time."""
        served = {name: entry for name, entry in self.registry.items() if entry.served}
        keys = {published_key(entry.served.request.lora_path) for entry in served.values() if entry.served}
        states = await asyncio.to_thread(lambda: {key: self._state(key) for key in keys})
        changed = False
        for name, entry in served.items():
            if entry.served is None or self.registry.get(name) is not entry:
                continue
            state = states[published_key(entry.served.request.lora_path)]
            if state != entry.served.copy:
                changed = True
                self.registry[name] = replace(entry, served=replace(entry.served, copy=state))
        return changed

    def _state(self, key: str) -> tuple[FileState, ...]:
        """States of a published copy's files; none where they cannot be seen."""
        try:
            return self.published.state(key)
        except OSError:
            return ()

    async def _attest(self) -> None:
        """Ask every worker whether it is guarded, and which copies it could not read."""
        try:
            answers = await ask_workers(self.pool.engine_client)
        except GuardError as error:
            self.workers = {"guarded": 0, "unguarded": 1}
            self._withdraw(None, error)
            return
        self.workers = _states(answers)
        self._withdraw({path for answer in answers for path in answer.lost})

    def _prepare_again(self) -> None:
        """Try again what could not be served."""
        if not self._preparing.locked():
            for name, entry in self.registry.items():
                # a refusal stays one, all else may pass
                if entry.served is None and not isinstance(entry.problem, AdapterRefused):
                    self._spawn(self._prepare(name))

    def _withdraw(self, lost: set[str] | None, error: SafeLoRAError | None = None) -> None:
        """Stop serving adapters under these paths, or all of them, until their copies are whole again."""
        self.pool.mark_lost(lost or set())
        found = {
            name: entry
            for name, entry in self.registry.items()
            if entry.served and (lost is None or entry.served.request.lora_path in lost)
        }
        for name, entry in found.items():
            assert entry.served is not None
            logger.error("adapter %r is withdrawn: its copy in the pool is not whole", name)
            self.pool.mark_lost({entry.served.request.lora_path})
            damaged = StoreUnavailable(f"the published copy of {name} was damaged; it is being made again")
            self._put(replace(entry, served=None, problem=error or damaged))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _same(one: LoRARequest, other: LoRARequest) -> bool:
    return bool(one.lora_int_id == other.lora_int_id)


def _states(answers: list[Attestation]) -> dict[str, int]:
    return {"guarded": len(answers), "unguarded": 0}
