"""Keeps the registry in step with the adapter store and with what the workers say.

The store's names are what shall be served; this brings it about in one API server process, whoever
changed them: this process, another API server, another host, or an operator's command. An adapter is given to
vLLM under the path ``safelora://KEY``: the key is a digest of content, projectors and policy, so that
prefix-cache blocks of other weights can never be reused, a server without the plugin cannot load it, and
``/v1/models`` shows no folder to anyone.

`StoreSync` sees changes of the store. A look every 2 s sees all else: damaged copies, workers that lost
their guard, rules that changed, and what could not be served before.

Rules change at a server's start or with the keys file. Then each adapter is judged anew in the background.
What is served stays served by its old copy until the new one is loaded; `rejudge` writes what the gate
decided into the adapter's record, from which all servers take it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import (
    AdapterRefused,
    ExamUnavailable,
    GateUnavailable,
    GuardError,
    SafeLoRAError,
    fresh_copy,
)
from safelora_vllm.files import make_folder
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.background import Background
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.decisions import exam_fields, log
from safelora_vllm.integration.server.engine import IDS_EACH, Pool, ask_workers
from safelora_vllm.integration.server.exam.again import Again
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.exam.schedule import Schedule
from safelora_vllm.integration.server.overdue import Overdue
from safelora_vllm.integration.server.published_copies import Copies, Copy
from safelora_vllm.integration.server.registry import Entry, Registry, being_prepared
from safelora_vllm.integration.server.rejudge import Rejudge
from safelora_vllm.integration.server.retries import Retries
from safelora_vllm.integration.server.served_names import ServedNames
from safelora_vllm.integration.server.serving_state import ServingState
from safelora_vllm.integration.server.store_sync import StoreSync, same_content
from safelora_vllm.integration.server.store_watch import StoreWatch
from safelora_vllm.integration.server.visibility import CallersRequests
from safelora_vllm.integration.server.watchdog import Watchdog
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore
from safelora_vllm.store.audit_log import SERVER, AuditLog, audit_fields
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.mirror import open_names
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.store.recorded import RecordedNames
from safelora_vllm.tenants.rules import SERVERS, TenantRules

logger = logging.getLogger("vllm.safelora.reconcile")
_STATIC_IDS = 2**19  # below the store's
_HEARTBEAT_SECONDS = 2.0
BeginExam = Callable[[Pool, GateClient, GateState, AuditLog, Callable[[str], TenantRules]], Awaitable[NoExam]]


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
        self.pool, self.copies, self.audit = pool, copies, audit
        self.background = Background()
        self.served = ServedNames(pool, self.background, copies.exam)
        self.store = StoreSync(
            pool.names, copies, self.registry, is_base_model, self.served.drop, self._change
        )
        self.watchdog = Watchdog(self.registry, copies, pool, self.served.put, workers)
        self.watchdog.repair = lambda entry: self.background.spawn(copies.repair(entry))
        self.again = Again(
            copies.exam,
            self.registry,
            self.watchdog.withdraw,
            lambda name: self.background.spawn(self._prepare(name, again=True)),
            audit,
        )
        self._rejudge = Rejudge(copies, pool, audit)
        self._state = ServingState(self.registry, copies, pool.names.root)
        self._preparing = asyncio.Lock()
        self._retries, self._overdue = Retries(), Overdue()

    @classmethod
    async def start(
        cls,
        engine_client: Any,
        models: Any,
        tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS,
        echo: Callable[[dict[str, Any]], None] = lambda _: None,
        exam: BeginExam | None = None,
        static: Mapping[str, Path] | None = None,
        exam_seconds: float | None = None,
        opinion_of_all: bool = False,
        apart: bool = False,
    ) -> Reconciler:
        """Ask every worker whether it is guarded, then serve ``--lora-modules`` and the store's names.

        Args:
            engine_client, models: vLLM's.
            tenant_rules: those of the tenant that owns a name, as they are now.
            echo: is told each record of the audit log.
            exam: begins the one that every adapter has to pass.
            static: adapters of ``--lora-modules``, which vLLM was not given.
            exam_seconds: between two exams of what is served.
            opinion_of_all: all adapters have a second opinion, whatever their policies say.
            apart: whether tenants are kept apart, by a keys file.

        Raises:
            GuardError: a worker is not guarded, or the workers do not agree on their rules.
        """
        answers = await ask_workers(engine_client)
        gate = GateClient(answers[0].socket)
        state = await asyncio.to_thread(gate.state)
        root = Path(state.store)
        pool = Pool(engine_client, await asyncio.to_thread(open_names, root))
        audit = await asyncio.to_thread(AuditLog, root / AUDIT, echo=echo)
        begun = await exam(pool, gate, state, audit, tenant_rules) if exam else None
        copies = Copies(gate, state, PublishedStore(root), tenant_rules, begun, opinion_of_all)
        await asyncio.to_thread(_complete, RecordedNames(pool.names, audit))
        made = cls(pool, copies, len(answers), models.is_base_model, audit)
        made.store.apart = apart
        given = seams.replace_map(models, CallersRequests(made.registry))
        for number, (name, folder) in enumerate((static or {}).items(), start=1):
            given[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))
        for position, request in enumerate(given.values()):
            await made._adopt_static(request, _STATIC_IDS + IDS_EACH * position)
        await asyncio.to_thread(make_folder, made.names.folder)
        made.store.watch = StoreWatch(made.names.folder)
        await asyncio.to_thread(made.names.look)
        await made.sync()
        for name, entry in made.registry.items():
            if entry.refusal and not _is_open(entry, made.copies.ruleset(name)):  # perhaps by another release
                made.background.spawn(made._prepare(name, again=True))
        await made._state.tell(made.store.passed_over)
        made.background.spawn(made._heartbeat())
        if exam_seconds and copies.exam.mode != "off":
            made.background.spawn(Schedule(made.again, root, exam_seconds).work())
        if made.names.is_mirror:
            made.background.spawn(made.store.follow_bucket())
        return made

    async def stop(self) -> None:
        """End all work in the background. What is served stays served."""
        await self.background.stop()
        await self.copies.exam.stop()
        if self.store.watch is not None:
            self.store.watch.close()

    @property
    def registry(self) -> Registry:
        """What is known of each name."""
        return self.served.registry

    @property
    def names(self) -> NameStore:
        """What shall be served."""
        return self.pool.names

    async def refresh(self) -> None:
        """`StoreSync.refresh`: for each request."""
        await self.store.refresh()

    async def sync(self) -> None:
        """Serve what the store's names say now, and nothing else.

        Raises:
            SafeLoRAError, OSError: the store cannot be read.
        """
        await self.store.sync()

    def _change(self, record: AdapterRecord, copy: Copy | None) -> None:
        """Act on a record that is not in the registry as it is. copy: its published one by today's rules."""
        name, live, before = record.name, record.live, self.registry.get(record.name)
        entry = Entry(name, live.id, live)
        is_judged = live.ruleset_digest == self.copies.ruleset(name)
        if copy is not None:
            self.served.serve(entry, copy)
            if not is_judged:
                self.background.spawn(self._prepare(name))
            return
        served = before.served if before and before.version and same_content(before.version, live) else None
        if live.refused:
            self.served.put(replace(entry, problem=AdapterRefused(list(live.refused))))
        else:  # what is served stays served until it was judged
            self.served.put(
                replace(entry, served=served, problem=None if served else self.copies.exam.pending(name))
            )
        if not (live.refused and is_judged):
            self.background.spawn(self._prepare(name))

    def wake(self, name: str) -> bool:
        """Whether it is worth waiting for a name: it is not served yet, was not refused, and has not failed.

        The gate is asked for it now, if it is not at work.
        """
        entry = self.registry.get(name)
        if entry is None or entry.state != "unavailable":
            return False
        if not self._retries.is_due(name):
            return False
        if not self._preparing.locked():
            self.background.spawn(self._prepare(name, when_due=True))
        return True

    async def prepare(self, name: str) -> None:
        """Try now to serve a name that is not served, however often that has failed."""
        await self._prepare(name, again=True)

    async def _prepare(self, name: str, again: bool = False, when_due: bool = False) -> None:
        """Let the gate find or make the published copy of a name, or refuse it, by the rules of today.

        again: also where it is served by them, or refused. when_due: not if a try has failed before its turn.
        """
        async with self._preparing:
            entry = self.registry.get(name)
            if when_due and not self._retries.is_due(name):
                return
            if entry is None or not (again or _is_open(entry, self.copies.ruleset(name))):
                return
            try:
                with acting_as(None):  # whoever's request has begun it
                    if entry.version is None:
                        copy: Copy | None = await self.copies.adopt(entry)
                    else:
                        copy = await self._rejudge.decide(entry, entry.version)
            except SafeLoRAError as error:
                self._failed(entry, error)
                return
            self._overdue.judged(name)
            if self._retries.served(name):
                logger.info("adapter %r could be judged again", name, extra=entry.log_fields)
            if copy is None:  # the record has changed: by this decision, or by somebody else
                await self.sync()
            elif self.registry.get(name) is entry:  # nobody changed or removed it meanwhile
                self.served.serve(entry, copy)

    def _failed(self, entry: Entry, error: SafeLoRAError) -> None:
        """An adapter cannot be judged now.

        While the gate restarts, or its exam gives no score, it stays served as before: until it is overdue.
        """
        stays = entry.served is not None and isinstance(error, (GateUnavailable, ExamUnavailable))
        if self._retries.failed(entry.name, str(error)):
            what = "judged now, and is served as before" if stays else "served now"
            problem = "adapter %r cannot be %s: %s; it is tried again"
            logger.error(problem, entry.name, what, error, extra=entry.log_fields)
        if isinstance(error, AdapterRefused):
            self._overdue.judged(entry.name)
        else:
            self._overdue.failed(entry.name)
        if self.registry.get(entry.name) is entry and not stays:
            self.served.put(replace(entry, served=None, problem=fresh_copy(error)))

    async def _adopt_static(self, request: LoRARequest, first_id: int) -> None:
        """Serve an adapter of the command line from its published copy instead of its folder.

        vLLM gave those of ``--default-mm-loras`` to the workers, which let them pass the gate: they go again.
        """
        name, path = request.lora_name, Path(request.lora_path)
        if not path.exists():
            raise GuardError(f"--lora-modules {name}: there is no {path}")
        self.served.put(Entry(name, first_id, folder=path, problem=being_prepared(name)))
        await self._prepare(name)
        served = self.registry[name].current()
        await self.pool.load(served.request)
        key = served.key
        accepted = audit_fields(self.copies.shown(served.report), "accepted")
        fields = accepted | exam_fields(self.copies.exam.found(key))
        await log(self.audit, SERVER, "load", name, once=key, **fields)
        await self.pool.engine_client.remove_lora(request.lora_int_id)

    async def _heartbeat(self) -> None:
        """Notice workers that lost their guard, published copies that are gone, and missed changes."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                await self.watchdog.look()
                await self.store.catch_up()
                await self.again.look()
                self._prepare_again()
                await self._state.tell(self.store.passed_over)
            except Exception as error:  # whatever it is, the next beat may succeed
                logger.warning("heartbeat: %s: %s", type(error).__name__, error)

    def _prepare_again(self) -> None:
        """Try again what could not be served, and judge anew what was judged by former rules.

        What is overdue is not served until it was.
        """
        self._retries.keep(self.registry)
        rulesets: dict[str, str] = {}  # of each tenant: adapters may be many
        is_open: dict[str, Entry] = {}  # a refusal stays one
        for name, entry in self.registry.items():
            if (owner := tenant_of(name)) not in rulesets:
                rulesets[owner] = self.copies.ruleset(name)
            if _is_open(entry, rulesets[owner]):
                is_open[name] = entry
        served = [name for name, entry in is_open.items() if entry.served]
        for name in self._overdue.look(served, self.copies.exam.scored):
            why = "it could not be judged by the rules of today for 15 minutes"
            self.watchdog.withdraw(is_open[name], why, self.copies.exam.pending(name))
        if not self._preparing.locked():
            for name in filter(self._retries.is_due, is_open):
                self.background.spawn(self._prepare(name, when_due=True))


def _complete(recorded: RecordedNames) -> None:
    """Add to the audit log what a killed server has not. Its absence stops no start."""
    try:
        recorded.settle()
    except SafeLoRAError as error:
        logger.error("the audit log is not complete: %s", error)


def _is_open(entry: Entry, ruleset: str) -> bool:
    """Whether a name is still to be judged by these rules, or judged and not served as its record says."""
    if entry.version is not None and entry.version.ruleset_digest != ruleset:
        return True
    if entry.served is None:
        return entry.state == "unavailable"
    return entry.version is not None and entry.served.key != entry.version.key
