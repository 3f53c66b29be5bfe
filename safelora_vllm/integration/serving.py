"""Loading and unloading while serving: keeps vLLM's serving map in step with what the gate accepted.

An adapter is in ``OpenAIServingModels.lora_requests`` under the path ``safelora://KEY``: the key is a
digest of content, projectors and policy, so that prefix-cache blocks of other weights can never be
reused, a server without the plugin cannot load it, and ``/v1/models`` shows no folder to anyone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import AdapterRefused, GuardError, SafeLoRAError, UsageError, refuse
from safelora_vllm.integration import seams
from safelora_vllm.integration.worker import SCHEME
from safelora_vllm.metrics import AdapterCollector, ServedAdapter
from safelora_vllm.report import Report
from safelora_vllm.service.client import GateClient

logger = logging.getLogger("vllm.safelora.serving")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIRST_ID = 2**40  # far above vLLM's own counter, which starts at 1
_HEARTBEAT_SECONDS = 2.0
_DRAIN_POLL_SECONDS = 0.2


class UnknownAdapter(SafeLoRAError):
    """No adapter is served under this name."""


class AlreadyLoaded(SafeLoRAError):
    """Another adapter is served under this name."""


@dataclass
class Serving:
    """The adapters of one API server process.

    engine_client and models are vLLM's ``EngineClient`` and ``OpenAIServingModels``.
    """

    engine_client: Any
    models: Any
    gate: GateClient
    workers: dict[str, int]
    served: dict[str, ServedAdapter] = field(default_factory=dict)
    _generation: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    @classmethod
    async def start(cls, engine_client: Any, models: Any) -> Serving:
        """Ask every worker whether it is guarded, then move adapters given at start to our paths.

        Raises:
            GuardError: a worker is not guarded, or the workers do not agree on their rules.
        """
        answers = await ask_workers(engine_client)
        serving = cls(engine_client, models, GateClient(answers[0]["socket"]), _states(answers))
        for request in list(models.lora_requests.values()):
            await serving._adopt_static(request)
        serving._spawn(serving._heartbeat())
        return serving

    async def load(self, name: str, path: str, replace: bool = False) -> Report:
        """Let a folder pass the gate and serve it under ``name``.

        Raises:
            UsageError: no such folder, or a name that cannot be used.
            AlreadyLoaded: the name is served and ``replace`` is false.
            AdapterRefused: the gate refuses, with all its reasons.
            GateUnavailable: the gate or its store is out of order.
        """
        if not NAME.fullmatch(name) or self.models.is_base_model(name):
            raise UsageError(
                f"{name!r:.200} cannot be an adapter's name: use up to 128 letters, digits, '.', '_' "
                "or '-', and not the name of the base model"
            )
        async with self._locks[name]:
            start = time.perf_counter()
            if name in self.models.lora_requests and not replace:
                raise AlreadyLoaded(f"{name} is already loaded; unload it first or set load_inplace")
            answer = await asyncio.to_thread(self.gate.call, "admit", path=path, name=name)
            report = Report.from_dict(answer["report"])
            if not report.accepted:
                raise AdapterRefused(report.reasons)
            await self._serve(name, answer["key"])
            self.served[name] = ServedAdapter(report, time.perf_counter() - start)
            return report

    async def unload(self, name: str) -> None:
        """Stop serving a name; its weights leave the workers when its last request has ended.

        Raises:
            UnknownAdapter: the name is not served.
        """
        async with self._locks[name]:
            request = self.models.lora_requests.pop(name, None)
            self.served.pop(name, None)
            if request is None:
                raise UnknownAdapter(f"no adapter {name!r:.200} is loaded")
            await self._release(request)

    def metrics(self) -> str:
        """Exposition text: the gate's counters (empty while it is down) and the served adapters."""
        collector = AdapterCollector(lambda: list(self.served.values()), lambda: self.workers)
        try:
            counters = str(self.gate.call("metrics", timeout=5.0))
        except SafeLoRAError as error:
            logger.warning("no gate metrics: %s", error)
            counters = ""
        return counters + collector.expose()

    async def _serve(self, name: str, key: str) -> None:
        """Put published weights into the workers' pools, then into the serving map."""
        path = f"{SCHEME}{key}"
        if generation := self._generation[key]:
            path += f"/{generation}"  # its old prefix-cache blocks were made without the adapter
        request = LoRARequest(name, adapter_id(name, path), path)
        previous = self.models.lora_requests.get(name)
        if previous is not None and previous.lora_path == path:
            return
        try:
            await self.engine_client.add_lora(request)
        except Exception as error:  # the engine sends back whatever class the worker raised
            raise refuse("not_loadable", f"vLLM cannot load the adapter: {error}") from error
        self.models.lora_requests[name] = request
        if previous is not None:
            await self._release(previous)

    async def _adopt_static(self, request: LoRARequest) -> None:
        """Serve an adapter of ``--lora-modules`` from its published copy instead of its folder.

        Its weights already passed the gate in the worker, so this finds them published.
        """
        name, path = request.lora_name, request.lora_path
        if not Path(path).is_dir():
            raise GuardError(f"--lora-modules {name}: {path} is no folder")
        del self.models.lora_requests[name]
        await self.load(name, path)
        await self.engine_client.remove_lora(request.lora_int_id)

    async def _release(self, request: LoRARequest) -> None:
        """Free the workers' copies now, or in the background once running requests have ended."""
        if not seams.in_flight(self.engine_client, request):
            await self.engine_client.remove_lora(request.lora_int_id)
        else:
            self._spawn(self._drain(request))

    async def _drain(self, request: LoRARequest) -> None:
        while seams.in_flight(self.engine_client, request):
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        if self.models.lora_requests.get(request.lora_name) != request:
            await self.engine_client.remove_lora(request.lora_int_id)

    async def _heartbeat(self) -> None:
        """Notice workers that lost their guard, and adapters whose published copy is gone."""
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                answers = await ask_workers(self.engine_client)
            except GuardError as error:
                logger.error("adapters are withdrawn: %s", error)
                self.workers = {"guarded": 0, "unguarded": 1}
                await self._withdraw(list(self.models.lora_requests))
                continue
            except Exception as error:  # a dead engine says so to its own clients
                logger.warning("the workers do not answer: %s", error)
                continue
            self.workers = _states(answers)
            lost = {path for answer in answers for path in answer["lost"]}
            await self._withdraw(
                [r.lora_name for r in self.models.lora_requests.values() if r.lora_path in lost]
            )

    async def _withdraw(self, names: list[str]) -> None:
        for name in names:
            request = self.models.lora_requests[name]
            logger.error("adapter %r is no longer served: load it again", name)
            self._generation[request.lora_path.removeprefix(SCHEME).partition("/")[0]] += 1
            await self.unload(name)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def ask_workers(engine_client: Any) -> list[dict[str, Any]]:
    """Every worker's attestation.

    Raises:
        GuardError: one is missing, unguarded, or applies other rules than the rest.
    """
    try:
        answers = await seams.ask_all_workers(engine_client)
    except (AttributeError, NotImplementedError) as error:
        raise GuardError(f"the workers have not loaded the safelora plugin ({error})") from error
    if not answers or not all(answer.get("guarded") for answer in answers):
        raise GuardError(
            f"not every worker is guarded ({answers}); no adapter is served. Set VLLM_PLUGINS=safelora "
            "where the workers run, and start with --enable-lora"
        )
    if len({(answer["projectors"], answer["policy"]) for answer in answers}) > 1:
        raise GuardError("the workers use different projector caches or policies")
    return answers


def adapter_id(name: str, path: str) -> int:
    """vLLM's integer id of an adapter: the same in every API server, since it is a digest."""
    digest = hashlib.sha256(f"{name}\n{path}".encode()).digest()
    return _FIRST_ID + int.from_bytes(digest[:7], "big") % 2**60


def _states(answers: list[dict[str, Any]]) -> dict[str, int]:
    guarded = sum(bool(answer.get("guarded")) for answer in answers)
    return {"guarded": guarded, "unguarded": len(answers) - guarded}
