"""The workers' pools of loaded adapters, as one API server process sees and changes them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import AdapterRefused, EngineUnavailable, GuardError, StoreUnavailable, refuse
from safelora_vllm.integration.adapter_uri import SCHEME, published_key
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.background import STORE, in_thread
from safelora_vllm.integration.server.tracing import span
from safelora_vllm.store import NameStore

# Each version of an adapter has this many of vLLM's ids in a row: its copy may get lost and come back.
IDS_EACH = 16
_RESERVED = 64  # versions whose ids a process takes from the store at once
_DRAIN_POLL_SECONDS = 0.2
_READ_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.002, 0.1
_READ_SECONDS = 60.0
_SMALL_BYTES = 4 * 1024**2


@dataclass
class Pool:
    """Loading, releasing and naming adapters in the engine.

    engine_client: vLLM's ``EngineClient``. names: the store that deals out ids.
    """

    engine_client: Any
    names: NameStore
    _lost: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _ids: list[int] = field(default_factory=list)

    async def new_id(self) -> int:
        """The ids of a new version."""
        if not self._ids:
            first = await in_thread(STORE, self.names.reserve_ids, _RESERVED * IDS_EACH)
            self._ids += range(first, first + _RESERVED * IDS_EACH, IDS_EACH)
        return self._ids.pop(0)

    def request(self, name: str, key: str, first_id: int) -> LoRARequest:
        """What vLLM is given: the same in every API server.

        A copy that was lost is served under another path and id than before: the pool may hold zeros
        under the old id, and prefix-cache blocks under the old path may have been made with them.

        Raises:
            StoreUnavailable: it was lost too often.
        """
        path = f"{SCHEME}{key}"
        if losses := len(self._lost[key]):
            path += f"/{losses}"
        if losses >= IDS_EACH:
            raise StoreUnavailable(
                f"the stored copy of {name} was lost {losses} times. Repair the adapter store and restart "
                "the server"
            )
        return LoRARequest(lora_name=name, lora_int_id=first_id + losses, lora_path=path)

    def mark_lost(self, paths: set[str]) -> None:
        """Remember paths whose copy could not be read by a worker."""
        for path in paths:
            self._lost[published_key(path)].add(path)

    async def load(self, request: LoRARequest, nbytes: float = math.inf) -> None:
        """Load published weights before anybody asks for them.

        Each question to the workers waits for a step. So what is small is asked for once, and read in a step
        as far as that is quick; if it is not, it is read ahead like all else. With several workers all is:
        where one of them was late, the others would have evicted an adapter for nothing.

        Args:
            request: of a published copy.
            nbytes: of its weights, about.

        Raises:
            AdapterRefused: vLLM cannot load it, with its own words.
            EngineUnavailable: the engine has ended.
            StoreUnavailable: the workers cannot read it in time.
        """
        with span("load", adapter=request.lora_name, bytes=nbytes):
            if nbytes <= _SMALL_BYTES and seams.worker_count(self.engine_client) <= 1:
                with contextlib.suppress(AdapterRefused):
                    if await self._add(request):
                        return
            await self._read_ahead(request)
            if not await self._add(request):
                raise StoreUnavailable(f"{request.lora_name} has not been read in time; load it again")

    async def _add(self, request: LoRARequest) -> bool:
        """False where the workers are still reading it."""
        try:
            return bool(await self.engine_client.add_lora(request))
        except Exception as error:  # the engine sends back whatever class the worker raised
            if getattr(self.engine_client, "errored", False):
                raise EngineUnavailable(f"the engine has ended: {error}") from error
            raise refuse("not_loadable", f"vLLM cannot load the adapter: {error}") from error

    async def _read_ahead(self, request: LoRARequest) -> None:
        """Wait until the workers have read an adapter beside their steps, in which the load follows.

        What is wrong with it, or with the engine, the load will say.

        Raises:
            StoreUnavailable: they have not, for long: a load would stop all steps for as long.
        """
        pause, began = _READ_POLL_SECONDS, time.monotonic()
        while not await self._prepared(request):
            if (waited := time.monotonic() - began) >= _READ_SECONDS:
                raise StoreUnavailable(
                    f"the workers have not read {request.lora_name} from the adapter store in {waited:.0f} "
                    "s, and it is not loaded. Repair the store's disk, then load it again"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)

    async def _prepared(self, request: LoRARequest) -> bool:
        try:
            return await seams.prepared_by_all_workers(self.engine_client, request)
        except Exception:  # a dead engine, or workers without the method: the load says so
            return True

    async def release(self, request: LoRARequest, wanted: Callable[[LoRARequest], bool]) -> None:
        """Free the workers' copy when this process's last request with it has ended, unless wanted then.

        Requests of other API servers may still run: their next step reads the published copy again.
        """
        while seams.in_flight(self.engine_client, request):
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        if not wanted(request):
            with contextlib.suppress(Exception):  # a dead engine has nothing to free
                await self.engine_client.remove_lora(request.lora_int_id)


async def ask_workers(engine_client: Any) -> list[Attestation]:
    """Every worker's attestation.

    Raises:
        GuardError: one is missing, unguarded, or applies other rules than the rest.
    """
    try:
        answers = await seams.ask_all_workers(engine_client)
    except (AttributeError, NotImplementedError) as error:  # how vLLM says that workers have no such method
        raise GuardError(f"the workers have not loaded the safelora plugin ({error})") from error
    try:
        attestations = Attestation.from_answers(answers)
    except ValueError as error:
        raise _unguarded(f"{answers}: {error}") from error
    if not attestations:
        raise _unguarded("none answers")
    if len({(worker.projectors, worker.policy) for worker in attestations}) > 1:
        raise GuardError("the workers use different projector caches or policies")
    return attestations


def _unguarded(found: str) -> GuardError:
    return GuardError(
        f"not every worker is guarded ({found}); no adapter is served. Set VLLM_PLUGINS=safelora "
        "where the workers run, and start with --enable-lora"
    )
