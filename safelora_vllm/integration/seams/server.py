"""What API servers need of vLLM: questions to all workers, requests, adapters, middleware, routes.

What each needs of vLLM is in `table`.
"""

from __future__ import annotations

import asyncio
import functools
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams.table import ATTEST, PREPARE

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from vllm.lora.request import LoRARequest


async def ask_all_workers(engine_client: Any) -> list[dict[str, Any]]:
    """The attestations of all workers of all data-parallel engines."""
    return await _call_all_workers(engine_client, ATTEST)


async def prepared_by_all_workers(engine_client: Any, request: LoRARequest) -> bool:
    """Have all workers read an adapter beside their steps. Whether all have."""
    given = request.lora_name, request.lora_int_id, request.lora_path
    return all(await _call_all_workers(engine_client, PREPARE, *given))


async def _call_all_workers(engine_client: Any, method: str, *given: object) -> list[Any]:
    core = engine_client.engine_core
    per_engine = await asyncio.gather(
        *[
            core._call_utility_async("collective_rpc", method, None, given, None, engine=engine)
            for engine in core.core_engines
        ]
    )
    return [answer for workers in per_engine for answer in workers]


def in_flight(engine_client: Any, request: LoRARequest) -> int:
    """Requests of this API server that still generate with an adapter's weights."""
    states = engine_client.output_processor.request_states.values()
    return sum(getattr(state.lora_request, "lora_int_id", None) == request.lora_int_id for state in states)


def ask_before(engine_client: Any, instead: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let each request of this API server's routes go through a ``generate`` that is made of the engine's."""
    engine_client.generate = instead(engine_client.generate)


def count_requests(engine_client: Any, counted: Callable[[Any, str | None, bool], Any]) -> None:
    """Let each request of this API server's routes go through ``counted``.

    counted: gets the outputs of a request, its adapter, and whether each output has the new tokens only;
    gives the outputs.
    """
    for method in ("generate", "encode"):
        if (given := getattr(engine_client, method, None)) is not None:
            setattr(engine_client, method, _counting(given, counted))


def _counting(
    given: Callable[..., Any], counted: Callable[[Any, str | None, bool], Any]
) -> Callable[..., Any]:
    @functools.wraps(given)
    def counting(*arguments: Any, **named: Any) -> Any:
        everything = (*arguments, *named.values())
        adapters = [a for a in everything if hasattr(a, "lora_int_id")]
        kinds = [a.output_kind.name for a in everything if hasattr(a, "output_kind")]
        name = adapters[0].lora_name if adapters else None
        return counted(given(*arguments, **named), name, kinds == ["DELTA"])

    return counting


def requests_now(engine_client: Any) -> tuple[Counter[str], Counter[str]]:
    """Running and waiting requests of this API server, by adapter; the model itself has no name."""
    running, waiting = Counter[str](), Counter[str]()
    for state in list(engine_client.output_processor.request_states.values()):
        stats = getattr(state, "stats", None)
        began = stats is None or getattr(stats, "scheduled_ts", 1.0) > 0
        (running if began else waiting)[getattr(state.lora_request, "lora_name", "")] += 1
    return running, waiting


def take_lora_modules(args: Namespace) -> dict[str, Path]:
    """The adapters of ``--lora-modules``, name → folder, which vLLM then does not load itself.

    vLLM reads the option after it has attached plugins' routes.
    """
    given, args.lora_modules = getattr(args, "lora_modules", None) or [], None
    return {module.name: Path(module.path) for module in given}


def replace_map(models: Any, mine: Mapping[str, LoRARequest]) -> dict[str, LoRARequest]:
    """Let vLLM's routes look adapters up in ``mine``; gives what they had.

    Raises:
        GuardError: another plugin was there first.
    """
    given = models.lora_requests
    if type(given) is not dict:
        raise GuardError(
            f"vLLM's map of adapters is a {type(given).__name__} instead of a dict; not guarded. "
            "Uninstall the plugin that put it there"
        )
    models.lora_requests = mine
    return given


def add_middleware(args: Namespace, middleware: type) -> None:
    """Name an ASGI middleware in the list of ``--middleware``, which vLLM adds outside of its key check."""
    args.middleware = [*args.middleware, f"{middleware.__module__}.{middleware.__qualname__}"]


def check_middleware(app: FastAPI, middleware: type) -> None:
    """Whether it stands outside of vLLM's key check, once vLLM has built the app.

    Raises:
        GuardError: it does not.
    """
    outside_in: list[Any] = [entry.cls for entry in app.user_middleware]
    key_checks = [at for at, cls in enumerate(outside_in) if cls.__name__ == "AuthenticationMiddleware"]
    if middleware not in outside_in or any(at < outside_in.index(middleware) for at in key_checks):
        raise GuardError(
            f"vLLM has built its server without {middleware.__name__} around the key check (seam "
            f"'middleware'; it has {[cls.__name__ for cls in outside_in]}), so callers cannot be told apart"
        )


def attach_first(app: FastAPI, router: APIRouter) -> None:
    """Put our routes before vLLM's: until 0.32 its own GET /metrics would hide ours."""
    routes = app.router.routes
    before = len(routes)
    app.include_router(router)
    routes[:] = [*routes[before:], *routes[:before]]


def worker_count(engine_client: Any) -> int:
    """How many workers all data-parallel engines have together; 0 where the engine does not say."""
    parallel = getattr(getattr(engine_client, "vllm_config", None), "parallel_config", None)
    return int(parallel.world_size * parallel.data_parallel_size) if parallel is not None else 0


@functools.cache
def vllm_version() -> str:
    """Of the vLLM that runs."""
    return str(import_module("vllm").__version__)
