"""A store with its running gate, and API servers on it whose engines are fake. They start in a moment.

The gate runs in this process, on the tiny model pair.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anyio.from_thread import BlockingPortal
from fastapi import FastAPI
from fastapi.testclient import TestClient

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.gate.server import _Handler, _Server
from safelora_vllm.gate.service import GateService
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.rules_check import tenant_check
from tests.server.fake_engine import MODEL, FakeEngine, all_routes

SECRET = "the tenant's long secret"


@dataclass(frozen=True)
class FakeServer:
    """A running API server process with its fake engine."""

    app: FastAPI
    engine: FakeEngine
    store: Path
    portal: BlockingPortal

    def client(self, key: str = "") -> TestClient:
        """A caller with a key. Each of them calls the one running application."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        made = TestClient(self.app, headers=headers, raise_server_exceptions=False)
        made.portal = self.portal
        return made


@dataclass
class Place:
    """A running gate with its store, and the keys file that callers are told apart by."""

    gate: GateConfig
    service: GateService
    keys: Path

    @classmethod
    @contextmanager
    def start(cls, cache: ProjectorCache, folder: Path, **policy: Any) -> Iterator[Place]:
        """With a gate at work until the block ends."""
        policy = {"method": "safe-lora", **policy}
        given = ServerSettings(str(cache.folder), str(folder / "store"), policy, trust_served_model=True)
        config = GateConfig(str(folder / "gate.sock"), "not compared", given)
        service = GateService(config)
        with _Server(config.socket, type("Handler", (_Handler,), {"service": service})) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield cls(config, service, folder / "keys.toml")
            server.shutdown()

    @property
    def store(self) -> Path:
        return Path(self.gate.settings.store)

    def tenant(self, **limits: int) -> Principal:
        """Who has the tenant's key, when the keys file has these limits."""
        lines = "".join(f"{name} = {value}\n" for name, value in limits.items())
        self.keys.touch(0o600)
        self.keys.write_text(f'[tenants.acme]\n{lines}[tenants.acme.keys]\nci = "{SECRET}"\n')
        return KeyRing.open(self.keys, None, []).identify(SECRET)

    def engine(self) -> FakeEngine:
        return FakeEngine.guarded(self.gate.socket, self.service.state)

    @asynccontextmanager
    async def manager(self) -> AsyncIterator[tuple[Manager, FakeEngine]]:
        """Another API server on this store, without its routes."""
        engine = self.engine()
        models = SimpleNamespace(lora_requests={}, is_base_model=MODEL.__eq__)
        keys = self.keys if self.keys.exists() else None
        given = self.gate.settings
        ring = KeyRing.open(keys, None, [], None, tenant_check(given.policy, given.projectors))
        reconciler = await Reconciler.start(engine, models, ring.rules, apart=True)
        try:
            yield Manager(reconciler, reconciler.audit, models.is_base_model), engine
        finally:
            await reconciler.stop()

    @contextmanager
    def server(
        self,
        static: Mapping[str, Path] | None = None,
        api_key: str = "",
        engine: FakeEngine | None = None,
        template_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Iterator[FakeServer]:
        """Another API server on this store, with vLLM's routes and ours.

        template_options: vLLM's --default-chat-template-kwargs.
        """
        engine = engine or self.engine()
        given = replace(self.gate.settings, **settings)
        options = {
            "default_chat_template_kwargs": template_options,
            "api_key": [api_key] if api_key else None,
        }
        app = all_routes(engine, given, static, **options)
        with TestClient(app) as client:
            assert client.portal is not None
            yield FakeServer(app, engine, self.store, client.portal)

    def audit(self) -> list[tuple[str, str, str, list[str]]]:
        """Action, adapter, decision and reasons of each entry."""
        entries = AuditLog(self.store / "audit").read()
        return [(e["action"], e["adapter"], e["decision"], e.get("reasons", [])) for e in entries]

    def kept(self) -> set[str]:
        """Digests of the contents that the store keeps."""
        return {path.parent.name for path in self.store.glob(f"raw/*/{WEIGHTS}")}
