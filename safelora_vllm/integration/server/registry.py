"""Keeps vLLM's serving map in step with the adapter store and with what the workers say.

The store's names are what shall be served; this brings it about in one API server process, whoever
changed them: this process, another API server, another host, or an operator's command. An adapter stands
in ``OpenAIServingModels.lora_requests`` under the path ``safelora://KEY``: the key is a digest of content,
projectors and policy, so that prefix-cache blocks of other weights can never be reused, a server without
the plugin cannot load it, and ``/v1/models`` shows no folder to anyone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from vllm.lora.request import LoRARequest
from watchfiles import awatch

from safelora_vllm.errors import (
    AdapterRefused,
    GateUnavailable,
    GuardError,
    SafeLoRAError,
    StoreUnavailable,
    Unavailable,
    again,
)
from safelora_vllm.files import FileState, make_folder
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.server.engine import IDS_EACH, Pool, ask_workers
from safelora_vllm.integration.server.metrics import AdapterCollector, ServedAdapter
from safelora_vllm.integration.server.visibility import ServingMap
from safelora_vllm.integration.worker.guard import published_key
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version

logger = logging.getLogger("vllm.safelora.serving")
P = ParamSpec("P")
R = TypeVar("R")
_STATIC_IDS = 2**19  # below the store's
_HEARTBEAT_SECONDS = 2.0
# A vLLM worker that was asked something spins for a second in case there is more: it is not asked each time.
_ATTEST_BEATS = 15
_ALERT_BEATS = 30  # asked at each, after a published copy changed
_GATE_CALLS = 32  # at once; the gate itself does one adapter at a time
_SETTLED_NS = 50_000_000  # a folder's time stamp is as coarse as the kernel's clock tick


@dataclass
class Serving:
    """The adapters of one API server process.

    pool: loads and frees weights. map: vLLM's serving map. state: the gate's `state` answer.
    is_base_model: whether a name is one of the model's own. served: name → report and figures of what is
    served now. static: name → folder of ``--lora-modules``.
    """

    pool: Pool
    map: ServingMap
    gate: GateClient
    state: GateState
    workers: dict[str, int]
    published: PublishedStore
    is_base_model: Callable[[str], bool]
    served: dict[str, ServedAdapter] = field(default_factory=dict)
    static: dict[str, Path] = field(default_factory=dict)
    _shown: dict[str, Version] = field(default_factory=dict)
    _passed_over: set[str] = field(default_factory=set)
    _stamp: int = -1
    _alert: int = 0
    _copies: dict[str, tuple[FileState, ...]] = field(default_factory=dict)
    _syncing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _background: set[asyncio.Task[None]] = field(default_factory=set)
    _gate_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_GATE_CALLS, thread_name_prefix="safelora-gate")
    )

    @classmethod
    async def start(cls, engine_client: Any, models: Any) -> Serving:
        """Ask every worker whether it is guarded, then serve ``--lora-modules`` and the store's names.

        Raises:
            GuardError: a worker is not guarded, or the workers do not agree on their rules.
        """
        answers = await ask_workers(engine_client)
        gate = GateClient(answers[0].socket)
        state = await asyncio.to_thread(gate.state)
        root = Path(state.store)
        pool = Pool(engine_client, NameStore(root))
        serving = cls(
            pool, ServingMap(), gate, state, _states(answers), PublishedStore(root), models.is_base_model
        )
        for request in seams.replace_map(models, serving.map).values():
            await serving._adopt_static(request)
        await asyncio.to_thread(make_folder, serving.names.folder)
        await serving.sync()
        serving._spawn(serving._heartbeat())
        serving._spawn(serving._watch())
        return serving

    @property
    def names(self) -> NameStore:
        """What shall be served."""
        return self.pool.names

    async def refresh(self) -> None:
        """`sync` if the store's names have changed: one look at their folder's time stamp.

        While the store cannot be read, what is known of it stays in force.
        """
        try:
            stamp = self.names.stamp()
            if stamp != self._stamp or time.time_ns() - stamp < _SETTLED_NS:
                await self.sync()
        except (SafeLoRAError, OSError) as error:
            logger.error("the adapter store cannot be read: %s", error)

    async def sync(self) -> None:
        """Serve what the store's names say, and nothing else."""
        async with self._syncing:
            stamp = self.names.stamp()
            changed, records = await asyncio.to_thread(self._read_changes)
            for name in [name for name in self._shown if name not in records]:
                self._hide(name)
                del self._shown[name]
            for record, report in changed:
                self._shown[record.name] = record.live
                if report is not None:
                    self._show(record.name, record.live.key, report, record.live)
                else:
                    self._hide(record.name)
                    self.map.unavailable[record.name] = GateUnavailable(
                        f"{record.name} is being prepared; try again in a moment"
                    )
                    self._spawn(self._prepare(record.name))
            self._stamp = stamp

    async def ask_gate(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """A call of ``gate`` that may take long, in threads of its own: asyncio's few are for the short ones.

        Raises:
            GateUnavailable: the gate is down or took too long. SafeLoRAError: whatever it raised.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._gate_threads, lambda: call(*arguments, **named))

    def metrics(self) -> str:
        """Exposition text: the gate's counters (empty while it is down) and the served adapters."""
        collector = AdapterCollector(lambda: list(self.served.values()), lambda: self.workers)
        try:
            counters = self.gate.metrics(timeout=5.0)
        except SafeLoRAError as error:
            logger.warning("no gate metrics: %s", error)
            counters = ""
        return counters + collector.expose()

    def _read_changes(self) -> tuple[list[tuple[AdapterRecord, Report | None]], dict[str, AdapterRecord]]:
        """Records that are not yet shown as they are, each with its report if it is published."""
        records = self.names.all()
        for name in [name for name in records if name in self.static or self.is_base_model(name)]:
            del records[name]  # the server's own command line goes first
            if name not in self._passed_over:
                self._passed_over.add(name)
                logger.error("the store's adapter %r is not served: the server itself has that name", name)
        return [
            (record, self._published_report(record.live))
            for name, record in records.items()
            if self._shown.get(name) != record.live
        ], records

    def _published_report(self, version: Version) -> Report | None:
        if version.ruleset_digest != self.state.ruleset_digest:  # other projectors or another policy
            return None
        if version.override and not self.published.has_override(version.key):
            return None  # an older release made it: the gate adds that when it is asked for it
        return self.published.report(version.key)

    def _show(self, name: str, key: str, report: Report, version: Version | None) -> None:
        first_id = version.id if version else _STATIC_IDS + IDS_EACH * list(self.static).index(name)
        try:
            request, previous = self.pool.request(name, key, first_id), dict.get(self.map, name)
        except Unavailable as error:
            self._hide(name)
            self.map.unavailable[name] = error
            return
        self.map[name] = request
        self._copies[key] = self._copy(key)
        self.map.unavailable.pop(name, None)
        self.served[name] = ServedAdapter(report.named(name), 0.0, version)
        if previous is not None and previous.lora_int_id != request.lora_int_id:
            self._release(previous)

    def _hide(self, name: str) -> None:
        self.map.unavailable.pop(name, None)
        self.served.pop(name, None)
        if (request := dict.pop(self.map, name, None)) is not None:
            self._release(request)

    async def _prepare(self, name: str) -> None:
        """Let the gate find or make the published copy of a name again, then serve it."""
        async with self._preparing:
            version = self._shown.get(name)
            if name not in self.map.unavailable or (version is None and name not in self.static):
                return
            try:
                if version is not None:
                    judged = await self.ask_gate(
                        self.gate.ensure, version.digest, name, version.policy, override=version.override
                    )
                else:
                    judged = await self.ask_gate(self.gate.admit, str(self.static[name]), name, keep=False)
                key = judged.accepted_key()
            except SafeLoRAError as error:
                logger.error("adapter %r cannot be served now: %s", name, error)
                if self._shown.get(name) == version:
                    self.map.unavailable[name] = again(error)
                return
            if self._shown.get(name) == version:  # nobody changed or removed it meanwhile
                self._show(name, key, judged.report, version)

    async def _adopt_static(self, request: LoRARequest) -> None:
        """Serve an adapter of ``--lora-modules`` from its published copy instead of its folder.

        Its weights already passed the gate in the worker, so this finds them published.
        """
        name, path = request.lora_name, Path(request.lora_path)
        if not path.exists():
            raise GuardError(f"--lora-modules {name}: there is no {path}")
        self.static[name] = path
        self.map.unavailable[name] = GateUnavailable(f"{name} is being prepared")
        await self._prepare(name)
        if name in self.map.unavailable:
            raise self.map.unavailable[name]
        await self.pool.load(dict.__getitem__(self.map, name))
        await self.pool.engine_client.remove_lora(request.lora_int_id)

    def _release(self, request: LoRARequest) -> None:
        self._spawn(self.pool.release(request, self._wanted))

    def _wanted(self, request: LoRARequest) -> bool:
        """Whether this very version is served."""
        current = dict.get(self.map, request.lora_name)
        return current is not None and current.lora_int_id == request.lora_int_id

    async def _watch(self) -> None:
        """React to changes of the store's names that other processes make."""
        try:
            async for _ in awatch(self.names.folder, recursive=False, debounce=100, step=20):
                await self.sync()
        except Exception as error:  # e.g. no inotify watches left: the heartbeat still looks
            logger.warning("the adapter store is not watched, but looked at every 2 s: %s", error)

    async def _heartbeat(self) -> None:
        """Notice workers that lost their guard, published copies that are gone, and missed changes."""
        for beat in itertools.count(1):
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                if await asyncio.to_thread(self._copies_changed):
                    self._alert = _ALERT_BEATS
                if self._alert or beat % _ATTEST_BEATS == 0:
                    self._alert = max(0, self._alert - 1)
                    await self._attest()
                await self._catch_up()
            except Exception as error:  # whatever it is, the next beat may succeed
                logger.warning("heartbeat: %s: %s", type(error).__name__, error)

    def _copies_changed(self) -> bool:
        """Whether the files of a served adapter are not those of the last time."""
        keys = {published_key(request.lora_path) for request in self.map.everything().values()}
        copies = {key: self._copy(key) for key in keys}
        changed = any(self._copies.get(key, state) != state for key, state in copies.items())
        self._copies = copies
        return changed

    def _copy(self, key: str) -> tuple[FileState, ...]:
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
            self._withdraw({request.lora_path for request in self.map.everything().values()}, error)
            return
        self.workers = _states(answers)
        self._withdraw({path for answer in answers for path in answer.lost})

    async def _catch_up(self) -> None:
        """See changes of the store that were missed, and try again what could not be served."""
        await self.refresh()
        if not self._preparing.locked():
            for name, problem in self.map.unavailable.items():
                if not isinstance(problem, AdapterRefused):  # a refusal stays one, all else may pass
                    self._spawn(self._prepare(name))

    def _withdraw(self, lost: set[str], error: SafeLoRAError | None = None) -> None:
        """Stop serving adapters under these paths until their copies are whole again."""
        self.pool.mark_lost(lost)
        for name, request in self.map.everything().items():
            if request.lora_path in lost:
                logger.error("adapter %r is withdrawn: its copy in the pool is not whole", name)
                self._hide(name)
                self.map.unavailable[name] = error or StoreUnavailable(
                    f"the published copy of {name} was damaged; it is being made again"
                )

    def timed(self, name: str, seconds: float) -> ServedAdapter:
        """Note how long it took from the request to being served."""
        self.served[name] = replace(self.served[name], load_seconds=seconds)
        return self.served[name]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _states(answers: list[Attestation]) -> dict[str, int]:
    return {"guarded": len(answers), "unguarded": 0}
