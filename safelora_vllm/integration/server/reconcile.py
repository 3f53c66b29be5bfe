"""Keeps the registry in step with the adapter store and with what the workers say.

The store's names are what shall be served; this brings it about in one API server process, whoever
changed them: this process, another API server, another host, or an operator's command. An adapter is given to
vLLM under the path ``safelora://KEY``: the key is a digest of content, projectors and policy, so that
prefix-cache blocks of other weights can never be reused, a server without the plugin cannot load it, and
``/v1/models`` shows no folder to anyone.

Two mechanisms see changes. Each request asks the kernel's queue (`StoreWatch`), so that what another API
server of this machine has answered is in force. A look every 2 s sees all else: other hosts, damaged copies,
workers that lost their guard, rules that changed, and what could not be served before.

Rules change at a server's start or with the keys file. Then each adapter is judged anew in the background.
What is served stays served by its old copy until the new one is loaded; `rejudge` writes what the gate
decided into the adapter's record, from which all servers take it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import (
    AdapterRefused,
    GateUnavailable,
    GuardError,
    SafeLoRAError,
    Unavailable,
    fresh_copy,
)
from safelora_vllm.files import make_folder
from safelora_vllm.gate.client import GateClient
from safelora_vllm.integration.adapter_uri import published_key
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.decisions import audit_fields, log
from safelora_vllm.integration.server.engine import IDS_EACH, Pool, ask_workers
from safelora_vllm.integration.server.published_copies import Copies, Copy
from safelora_vllm.integration.server.registry import Entry, Registry, Served, being_prepared
from safelora_vllm.integration.server.rejudge import Rejudge
from safelora_vllm.integration.server.serving_state import ServingState
from safelora_vllm.integration.server.store_watch import StoreWatch
from safelora_vllm.integration.server.visibility import CallersRequests
from safelora_vllm.integration.server.watchdog import Watchdog
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from safelora_vllm.store.audit_log import SERVER, AuditLog
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.serving import tenant_of
from safelora_vllm.tenants.rules import SERVERS, TenantRules

logger = logging.getLogger("vllm.safelora.reconcile")
_STATIC_IDS = 2**19  # below the store's
_HEARTBEAT_SECONDS = 2.0
_SETTLED_NS = 50_000_000
# A request waits this long for a change that was seen. Where the store hangs, the next ones do not wait.
_PATIENCE_SECONDS = 1.0


class Reconciler:
    """The adapters of one API server process.

    pool: loads and frees weights. copies: what is published. workers: how many there are, all guarded.
    is_base_model: whether a name is one of the model's own. audit: what the server itself decides.
    """

    def __init__(
        self,
        pool: Pool,
        copies: Copies,
        workers: int,
        is_base_model: Callable[[str], bool],
        audit: AuditLog,
    ) -> None:
        self.registry: Registry = {}
        self.pool, self.copies, self.audit, self._is_base_model = pool, copies, audit, is_base_model
        self.watchdog = Watchdog(self.registry, copies, pool, self._put, workers)
        self._rejudge = Rejudge(copies, pool, audit)
        self._state = ServingState(self.registry, copies, pool.names.root)
        self._passed_over: set[str] = set()
        self._stamp = -1
        self._watch: StoreWatch | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._sync_again = self._behind = self._store_hangs = False
        self._preparing = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        engine_client: Any,
        models: Any,
        tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS,
    ) -> Reconciler:
        """Ask every worker whether it is guarded, then serve ``--lora-modules`` and the store's names.

        Args:
            engine_client, models: vLLM's.
            tenant_rules: those of the tenant that owns a name, as they are now.

        Raises:
            GuardError: a worker is not guarded, or the workers do not agree on their rules.
        """
        answers = await ask_workers(engine_client)
        gate = GateClient(answers[0].socket)
        state = await asyncio.to_thread(gate.state)
        root = Path(state.store)
        pool = Pool(engine_client, NameStore(root))
        copies = Copies(gate, state, PublishedStore(root), tenant_rules)
        audit = await asyncio.to_thread(AuditLog, root / AUDIT)
        made = cls(pool, copies, len(answers), models.is_base_model, audit)
        given = seams.replace_map(models, CallersRequests(made.registry))
        for position, request in enumerate(given.values()):
            await made._adopt_static(request, _STATIC_IDS + IDS_EACH * position)
        await asyncio.to_thread(make_folder, made.names.folder)
        made._watch = StoreWatch(made.names.folder)
        await made.sync()
        for name, entry in made.registry.items():
            refused = isinstance(entry.problem, AdapterRefused)  # perhaps by another release
            if refused and not _is_open(entry, made.copies.ruleset(name)):
                made._spawn(made._prepare(name, again=True))
        await made._state.tell(made._passed_over)
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
                self._change(record, copy)

    def _change(self, record: AdapterRecord, copy: Copy | None) -> None:
        """Act on a record that is not in the registry as it is. copy: its published one by today's rules."""
        name, live, before = record.name, record.live, self.registry.get(record.name)
        entry = Entry(name, live.id, live)
        if copy is not None:
            return self._serve(entry, copy)
        served = before.served if before and before.version and _same_content(before.version, live) else None
        if live.refused:
            self._put(replace(entry, problem=AdapterRefused(list(live.refused))))
        else:  # what is served stays served until it was judged
            self._put(replace(entry, served=served, problem=None if served else being_prepared(name)))
        if not live.refused or live.ruleset_digest != self.copies.ruleset(name):
            self._spawn(self._prepare(name))

    def _read_changes(self) -> tuple[list[tuple[AdapterRecord, Copy | None]], dict[str, AdapterRecord]]:
        """Records that are not in the registry as they are, each with its copy if it is published; all."""
        records = self.names.all()
        taken = {name for name, entry in list(self.registry.items()) if entry.folder}
        for name in [name for name in records if name in taken or self._is_base_model(name)]:
            del records[name]  # the server's own command line goes first
            if name not in self._passed_over:
                self._passed_over.add(name)
                logger.error("the store's adapter %r is not served: the server itself has that name", name)
        known = {name: entry.version for name, entry in list(self.registry.items())}
        return [
            (record, self.copies.find(name, record.live))
            for name, record in records.items()
            if self._is_news(name, known.get(name), record.live)
        ], records

    def _is_news(self, name: str, known: Version | None, live: Version) -> bool:
        """Whether a record says something new. What was decided by other rules is another host's."""
        if known == live:
            return False
        if known is None or not _same_content(known, live):
            return True
        today = self.copies.ruleset(name)
        return live.ruleset_digest == today or known.ruleset_digest != today

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

    async def _prepare(self, name: str, again: bool = False) -> None:
        """Let the gate find or make the published copy of a name, or refuse it, by the rules of today.

        again: also where it is served by them, or refused.
        """
        async with self._preparing:
            entry = self.registry.get(name)
            if entry is None or not (again or _is_open(entry, self.copies.ruleset(name))):
                return
            try:
                if entry.version is None:
                    copy: Copy | None = await self.copies.adopt(entry)
                else:
                    copy = await self._rejudge.decide(entry, entry.version)
            except SafeLoRAError as error:
                self._failed(entry, error)
                return
            if copy is None:  # the record has changed: by this decision, or by somebody else
                await self.sync()
            elif self.registry.get(name) is entry:  # nobody changed or removed it meanwhile
                self._serve(entry, copy)

    def _failed(self, entry: Entry, error: SafeLoRAError) -> None:
        """An adapter cannot be judged now. While the gate restarts, it stays served as before."""
        logger.error("adapter %r cannot be served now: %s", entry.name, error)
        if self.registry.get(entry.name) is entry and not (
            entry.served and isinstance(error, GateUnavailable)
        ):
            self._put(replace(entry, served=None, problem=fresh_copy(error)))

    async def _adopt_static(self, request: LoRARequest, first_id: int) -> None:
        """Serve an adapter of ``--lora-modules`` from its published copy instead of its folder.

        Its weights already passed the gate in the worker, so this finds them published.
        """
        name, path = request.lora_name, Path(request.lora_path)
        if not path.exists():
            raise GuardError(f"--lora-modules {name}: there is no {path}")
        self._put(Entry(name, first_id, folder=path, problem=being_prepared(name)))
        await self._prepare(name)
        served = self.registry[name].current()
        await self.pool.load(served.request)
        await log(
            self.audit, SERVER, "load", name,
            once=published_key(served.request.lora_path), **audit_fields(served.report, "accepted"),
        )  # fmt: skip
        await self.pool.engine_client.remove_lora(request.lora_int_id)

    def _release(self, request: LoRARequest) -> None:
        self._spawn(self.pool.release(request, self._wanted))

    def _wanted(self, request: LoRARequest) -> bool:
        """Whether this very version is served."""
        entry = self.registry.get(request.lora_name)
        return entry is not None and entry.served is not None and _same(entry.served.request, request)

    async def _heartbeat(self) -> None:
        """Notice workers that lost their guard, published copies that are gone, and missed changes."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                await self.watchdog.look()
                await self._catch_up()
                self._prepare_again()
                await self._state.tell(self._passed_over)
            except Exception as error:  # whatever it is, the next beat may succeed
                logger.warning("heartbeat: %s: %s", type(error).__name__, error)

    async def _catch_up(self) -> None:
        """`sync` if the folder of the store's names has changed, whoever did it."""
        stamp = await asyncio.to_thread(self.names.stamp)
        if stamp != self._stamp:
            await self.sync()
            # A folder's time stamp is as coarse as the kernel's clock tick: a second change may not show.
            self._stamp = stamp if time.time_ns() - stamp > _SETTLED_NS else -1

    def _prepare_again(self) -> None:
        """Try again what could not be served, and judge anew what was judged by former rules."""
        if not self._preparing.locked():
            rulesets: dict[str, str] = {}  # of each tenant: adapters may be many
            for name, entry in self.registry.items():  # a refusal stays one
                if (owner := tenant_of(name)) not in rulesets:
                    rulesets[owner] = self.copies.ruleset(name)
                if _is_open(entry, rulesets[owner]):
                    self._spawn(self._prepare(name))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _is_open(entry: Entry, ruleset: str) -> bool:
    """Whether a name is still to be judged by these rules, or judged and not served as its record says."""
    if entry.version is not None and entry.version.ruleset_digest != ruleset:
        return True
    if entry.served is None:
        return not isinstance(entry.problem, AdapterRefused)
    return entry.version is not None and published_key(entry.served.request.lora_path) != entry.version.key


def _same_content(one: Version, other: Version) -> bool:
    """Whether one was made of the other by judging it anew, if at all."""
    return one.unjudged == other.unjudged


def _same(one: LoRARequest, other: LoRARequest) -> bool:
    return bool(one.lora_int_id == other.lora_int_id)
