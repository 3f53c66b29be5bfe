"""vLLM's endpoint-plugin contract (``vllm/plugins/endpoint_plugins/interface.py``) for safelora."""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import secrets
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from safelora_vllm.durations import seconds_in
from safelora_vllm.errors import GuardError, SafeLoRAError
from safelora_vllm.exam.reference import ANSWER_TOKENS
from safelora_vllm.gate.socket_folder import remove_unowned
from safelora_vllm.integration.json_logs import print_audit
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.access_check import RouteAccess, check_routes, granted
from safelora_vllm.integration.server.access_rules import Access
from safelora_vllm.integration.server.accounting import counted
from safelora_vllm.integration.server.admin_socket import AdminSocket
from safelora_vllm.integration.server.announcement import access_line, caps_warning, rules_line
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.chat_format import ChatFormat
from safelora_vllm.integration.server.exam.start import start_exam
from safelora_vllm.integration.server.http_errors import error_response
from safelora_vllm.integration.server.metrics import Metrics
from safelora_vllm.integration.server.middleware import AccessMiddleware, Door
from safelora_vllm.integration.server.page_routes import page_router
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.registry import Registry
from safelora_vllm.integration.server.remote_sources import RemoteSources
from safelora_vllm.integration.server.routes import router
from safelora_vllm.integration.server.second_opinion import ByPolicy, SecondOpinion
from safelora_vllm.integration.server.traffic import TrafficTable
from safelora_vllm.integration.server.uploads import UploadLimiter
from safelora_vllm.integration.server.views import Views
from safelora_vllm.integration.server.visibility import CallersRequests
from safelora_vllm.settings import ADMIN_KEY, METRICS_KEY, SECTION, ServerSettings, new_admin_key
from safelora_vllm.store.mirror import attach, open_names
from safelora_vllm.tenants.keyless import check_keyless
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.rules_check import tenant_check

logger = logging.getLogger("vllm.safelora.endpoint")
_WORKER_END_SECONDS = 10.0
NO_LORA = ServerSettings(projectors="")


class SafeLoRAEndpoint:
    """Attaches our routes and builds the serving state of one API server process."""

    name = "safelora"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the middleware that decides who may call which."""
        args = app.state.args
        lora = getattr(args, "enable_lora", False)
        described = lora or SECTION in (args.additional_config or {})
        settings = ServerSettings.from_additional_config(args.additional_config) if described else NO_LORA
        inference = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        metrics_key = os.environ.get(METRICS_KEY) or None
        keys = KeyRing.open(
            Path(settings.keys) if settings.keys else None,
            _admin_key(args, settings),
            inference,
            metrics_key,
            tenant_check(settings.policy, settings.projectors, settings.exam_given)
            if lora and settings.keys
            else None,
        )
        more = granted(settings.route_access)
        if getattr(args, "enable_offline_docs", False):
            more["* /static/*"] = Access.DOCS
        self._metrics_have_key = metrics_key is not None
        access = RouteAccess(lora, self._metrics_have_key, settings.private_docs, more)
        door = Door(keys, secrets.token_urlsafe(32), access)
        if inference:
            args.api_key = [*inference, door.inner_key]
        else:
            logger.warning(
                "no --api-key is set: everybody who reaches this server may use the base model and %s. "
                "Changes need an admin or a tenant key",
                "adapters without a tenant" if settings.keys else "all adapters",
            )
        seams.add_middleware(args, AccessMiddleware)
        app.state.safelora_door = door
        app.state.safelora_upload_limiter = UploadLimiter(settings.concurrent_uploads)
        # vLLM would have the workers load their folders, before an exam and without a second opinion.
        self._static = seams.take_lora_modules(args) if lora else {}
        seams.attach_first(app, router)
        if not settings.no_page:
            seams.attach_first(app, page_router)
        app.state.safelora_remote_sources = RemoteSources.of(settings, lambda: keys.tenants)
        self._app = app

        @app.exception_handler(SafeLoRAError)
        async def answer(_: Request, error: SafeLoRAError) -> JSONResponse:
            return error_response(error)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start serving adapters, if this server has an engine with LoRA.

        Raises:
            GuardError: a worker is not guarded, the middleware is not where it has to be, the server's
            routes cannot be told apart, its admin socket could be another's, or the store has adapters of
            tenants and there is no keys file; the server does not start.
        """
        seams.check_middleware(self._app, AccessMiddleware)
        check_routes(self._app.router.routes)
        if engine_client is None or not getattr(args, "enable_lora", False):
            return
        settings = ServerSettings.from_additional_config(args.additional_config)
        listening = None
        if settings.admin_socket:
            port = getattr(args, "host", None), getattr(args, "port", None)
            listening = AdminSocket(Path(settings.admin_socket), f"{Path(settings.store).resolve()} {port}")
        state.safelora_admin_socket = listening
        models = state.openai_serving_models
        await asyncio.to_thread(attach, settings.store, settings.store_mirror)
        if not settings.keys:
            await asyncio.to_thread(_check_names, settings.store)
        state.safelora = reconciler = await Reconciler.start(
            engine_client,
            models,
            self._app.state.safelora_door.keys.rules,
            print_audit if settings.audit_stdout else lambda _: None,
            functools.partial(start_exam, settings, args),
            self._static,
            seconds_in(settings.exam_every) if settings.exam_every else None,
            bool(settings.second_opinion),
            bool(settings.keys),
        )
        # vLLM ends the workers and the gate without a word, unless it has a --shutdown-timeout.
        atexit.register(remove_unowned, Path(reconciler.copies.gate.socket_path).parent, _WORKER_END_SECONDS)
        openings = (await ChatFormat.of(engine_client, args)).openings() if _reads(engine_client) else []
        traffic = self._count(engine_client, state, models.lora_requests, settings, openings)
        door, gate = self._app.state.safelora_door, reconciler.copies.state
        told = rules_line(gate, reconciler.copies.ladder)
        logger.log(logging.INFO if gate.policy.enforcing else logging.WARNING, "%s", told)
        if warning := caps_warning(gate.policy, reconciler.copies.ladder):
            logger.warning("%s", warning)
        logger.info("%s", access_line(door.keys.principals, door.access, self._app.router.routes))
        state.safelora_manager = manager = Manager(
            reconciler,
            reconciler.audit,
            models.is_base_model,
            tuple(Path(root).resolve() for root in settings.adapter_roots),
            settings.max_adapter_bytes,
            settings.allow_hub,
        )
        manager.start()
        state.safelora_views = Views(
            reconciler,
            lambda: door.keys.tenants,
            settings.tenant_reports,
            traffic.of,
        )
        if listening is not None:
            listening.serve(self._app)

    def _count(
        self,
        engine_client: Any,
        state: Any,
        served: CallersRequests,
        settings: ServerSettings,
        openings: list[list[int]],
    ) -> TrafficTable:
        """Count requests and what the workers do. served: what vLLM looks adapters up in."""
        reconciler: Reconciler = state.safelora
        keys: KeyRing = self._app.state.safelora_door.keys
        traffic = TrafficTable(Path(reconciler.copies.gate.socket_path).parent)
        atexit.register(traffic.close)
        _give_opinions(engine_client, reconciler.registry, settings, traffic, openings)
        seams.count_requests(
            engine_client, lambda outputs, name, delta: counted(outputs, name, delta, traffic)
        )
        served.missed = lambda name: traffic.ended(name, "unavailable")
        state.safelora_metrics = made = Metrics(
            reconciler,
            traffic,
            seams.worker_count(engine_client),
            settings.store_bytes,
            self._metrics_have_key,
            (lambda: keys.is_current) if settings.keys else None,
        )
        reconciler.watchdog.also = made.count_now
        made.count_now()
        return traffic


def _check_names(store: str) -> None:
    """Raises GuardError where everybody could use a tenant's adapter, of this store or of its bucket."""
    names = open_names(store)
    names.look()
    check_keyless(store, names.all().values())


def _give_opinions(
    engine_client: Any,
    registry: Registry,
    settings: ServerSettings,
    traffic: TrafficTable,
    openings: list[list[int]],
) -> None:
    """Have requests judged by the aligned model: for all adapters, or for those whose policy says so."""
    can_read = _reads(engine_client)
    if settings.names_opinion and not can_read:
        raise GuardError(
            "a second opinion needs vLLM's tokenizer, to read what the aligned model says: start without "
            "--skip-tokenizer-init and --tokens-only"
        )
    tokens, everybody = settings.second_opinion or ANSWER_TOKENS, bool(settings.second_opinion)
    by_it = ByPolicy(registry)
    seams.ask_before(
        engine_client,
        lambda given: (
            SecondOpinion(
                given,
                tokens,
                traffic.refused,
                lambda request: everybody or by_it.wanted(request),
                can_read,
                by_it.ends,
                openings,
            ).generate
        ),
    )
    if settings.names_opinion:
        whose = "all adapters" if everybody else "adapters whose policy says so"
        logger.info("second opinion of %s: %s tokens of the aligned model", whose, tokens)
        if not openings:
            logger.warning(
                "the chat template does not tell where an answer begins: the aligned model is asked to write "
                "on where it would end, and refuses more often without need"
            )


def _reads(engine_client: Any) -> bool:
    """Whether vLLM has a tokenizer here."""
    return not getattr(engine_client.model_config, "skip_tokenizer_init", False)


def _admin_key(args: Namespace, settings: ServerSettings) -> str | None:
    """The key from the environment, or, where no keys file is given, one made now and printed.

    Raises:
        GuardError: several API servers would each make their own.
    """
    if (key := os.environ.get(ADMIN_KEY)) or settings.keys:
        return key or None
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise GuardError(f"several API servers need one admin key: set {ADMIN_KEY}")
    return new_admin_key()
