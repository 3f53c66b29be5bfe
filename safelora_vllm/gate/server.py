"""The gate process: ``python -m safelora_vllm.gate.server``, settings as one line on stdin.

It answers one line of JSON on stdout when it is ready (or why it cannot be), then lines of JSON on
a Unix socket, and ends when stdin closes, that is, when its worker is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from safelora_vllm.adapters.read import Limits
from safelora_vllm.errors import GateUnavailable, QuotaExceeded, SafeLoRAError
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.gate.metrics import GateMetrics
from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.store import PublishedStore, RawStore
from safelora_vllm.store.housekeeping import check_store, clean, collect, collect_unreferenced
from safelora_vllm.tenants.quotas import Allowance

logger = logging.getLogger("vllm.safelora.gate")
_MAX_LINE = 16 * 1024**2  # digests of all that a tenant owns are in it, 67 bytes each
_COLLECT_SECONDS = 300.0
_UNREFERENCED_SECONDS = 900.0  # longer than from keeping an upload to naming it
_HEADER_BYTES = 16 * 1024**2


class GateService:
    """The operations that clients may call; each takes and returns plain JSON values.

    Raises:
        GuardError: every user of this machine may write to the store.
        ProjectorCacheError, PolicyError, CheckpointError: the settings do not fit each other.
    """

    def __init__(self, config: GateConfig) -> None:
        check_store(config.store)
        cache = ProjectorCache(config.projectors)
        cache.verify()
        if not config.trust_served_model:
            cache.check_model(Checkpoint(config.model).fingerprint(), config.model)
        policy = Policy.from_mapping(config.policy)
        energy = policy.energy if policy.has_effect("energy") else 0.0
        output_energy = energy if METHODS[policy.method].reads_output_bases else 0.0
        cache.load(config.device, config.projector_bytes, energy, output_energy)
        self._settings = GateSettings(
            cache=cache,
            policy=policy,
            device=torch.device(config.device),
            dtype=getattr(torch, config.dtype),
            limits=Limits(weights_bytes=_weights_bytes(config, cache), max_rank=config.max_rank),
            base_model=Path(config.model).name,
        )
        _check_energy(self._settings)
        self._asked_for: set[str] = set()
        self._published, self._raw = PublishedStore(config.store), RawStore(config.store)
        self._store_bytes = config.store_bytes
        clean(config.store)
        self._metrics = GateMetrics(CollectorRegistry())
        self._metrics.describe(cache, self._settings.policy.enforcing)
        self._one_at_a_time = threading.Lock()
        self._busy_since: float | None = None

    def admit(
        self,
        path: str,
        name: str,
        policy: dict[str, Any] | None = None,
        override: bool = False,
        keep: bool = True,
        allowance: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run the gate on one adapter folder or archive.

        policy, override: see `_rules`. keep: store the content too, so that it can be judged again without
        its uploader. allowance: fields of `safelora_vllm.tenants.quotas.Allowance`.
        """
        settings = self._rules(policy, override)
        raw, room = self._raw if keep else None, Allowance(**allowance) if allowance else None
        try:
            with self._one_at_a_time, self._busy():
                admission = admit(path, name, settings, self._published, raw, room)
        except QuotaExceeded:
            raise
        except SafeLoRAError as error:
            self._metrics.record_error(type(error).__name__)
            raise
        self._metrics.record(admission)
        if override and admission.key is not None:
            self._asked_for.add(admission.key)
        if self._store_bytes is not None and not admission.cached:
            self._collect(self._store_bytes)
        return {
            "report": admission.report.to_dict(),
            "key": admission.key,
            "bytes": admission.nbytes,
            "rules": self._settings.rules,
        }

    def ensure(
        self, digest: str, name: str, policy: dict[str, Any] | None = None, override: bool = False
    ) -> dict[str, Any]:
        """The published copy of stored content under a policy, made again where it is missing."""
        settings = self._rules(policy, override)
        if not self._raw.has(digest):
            raise GateUnavailable(f"the store has no content {digest}; upload {name} again")
        key = settings.key(digest)
        if (report := self._published.find(key)) is None:
            if wrong := self._raw.damaged(digest):
                found = f"the store's content {digest} is damaged ({wrong})"
                raise GateUnavailable(f"{found}; upload {name} again")
            return self.admit(str(self._raw.path(digest)), name, policy, override)
        self._published.touch(key)
        if override:
            self._asked_for.add(key)
        return {
            "report": report.named(name).to_dict(),
            "key": key,
            "bytes": self._raw.nbytes(digest),
            "rules": self._settings.rules,
        }

    def vouches(self, key: str) -> bool:
        """Whether this gate was asked for this copy with an admin's override."""
        return key in self._asked_for

    def _rules(self, policy: dict[str, Any] | None, override: bool) -> GateSettings:
        """The settings with some of the policy's fields replaced.

        Without an admin's ``override`` they can only make it stricter: of what was once set under another
        server's policy, that stays which is stricter than this one's.
        """
        asked, own = self._settings.under(policy or {}), self._settings.policy
        if override or asked.policy.at_least_as_strict(own):
            return asked
        logger.warning("a kept policy (%s) cannot be compared with the server's (%s)", asked.policy, own)
        return self._settings.under(dataclasses.asdict(own.tightened(asked.policy)))

    def metrics(self) -> str:
        """Exposition text of this gate's counters."""
        return self._metrics.expose()

    def state(self) -> dict[str, Any]:
        """Identity of the projector cache and of the policy that this gate applies.

        busy_seconds: for how long it has been at one adapter.
        """
        settings, since = self._settings, self._busy_since
        return {
            "projectors": settings.cache.id,
            "policy": settings.policy.id,
            "policy_values": dataclasses.asdict(settings.policy),
            "rules": settings.rules,
            "store": str(self._published.root),
            "pid": os.getpid(),
            "busy_seconds": time.monotonic() - since if since is not None else 0.0,
        }

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def keep_clean(self) -> None:
        """Free the space of uploads that no name refers to any more, every few minutes, without end.

        They are no part of a tenant's quota: what he uploads and removes again would fill the disk.
        """
        while True:
            try:
                collect_unreferenced(self._published.root, _UNREFERENCED_SECONDS)
            except Exception as error:  # such as a record that cannot be read: nothing may go then
                logger.warning("unreferenced uploads are kept: %s", error)
            time.sleep(_COLLECT_SECONDS)

    def _collect(self, store_bytes: int) -> None:
        """Remove old copies. What was accepted is served, whether that works or not."""
        try:
            collect(self._published.root, store_bytes)
        except Exception:
            logger.exception("the adapter store %s could not be kept small", self._published.root)


OPERATIONS = ("admit", "ensure", "vouches", "metrics", "state")


def _weights_bytes(config: GateConfig, cache: ProjectorCache) -> int:
    """Most bytes of a weights file: see `GateConfig`, max_adapter_bytes."""
    sides = sum(sum(entry.shape) for entry in cache.modules.values())
    factors = torch.float32.itemsize * config.max_rank * sides
    return min(config.max_adapter_bytes, 4 * factors + _HEADER_BYTES)


def _check_energy(settings: GateSettings) -> None:
    """Find out now, not at the first adapter, whether the cache can serve the policy's energy."""
    if settings.policy.has_effect("energy"):
        for name in settings.cache.modules:
            settings.cache.projector(name, settings.device).directions(settings.policy.energy)


class _Handler(socketserver.StreamRequestHandler):
    """Answers each line of one connection: {"op", …} → {"result"} or {"error", "type"}."""

    service: GateService

    def handle(self) -> None:
        while line := self.rfile.readline(_MAX_LINE):
            self.wfile.write(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            if not line.endswith(b"\n"):
                raise SafeLoRAError(f"a call has at most {_MAX_LINE:,} bytes")
            request = json.loads(line)
            operation = request.pop("op")
            if operation not in OPERATIONS:
                raise SafeLoRAError(f"no operation {operation!r}")
            return {"result": getattr(self.service, operation)(**request)}
        except SafeLoRAError as error:
            return {"error": str(error), "type": type(error).__name__}
        except Exception as error:  # one request must not end the gate for all others
            logger.exception("the gate failed on a request")
            return {"error": f"{type(error).__name__}: {error}", "type": "GateUnavailable"}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128  # a full queue refuses a Unix socket's client at once


def main() -> int:
    """Entry point of the process. Exit code 0 when stdin closes, 1 when it cannot start."""
    logging.basicConfig(format="%(levelname)s [safelora gate] %(message)s", level=logging.INFO)
    config = GateConfig.from_json(sys.stdin.readline())
    os.nice(config.niceness)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not the few cores of the worker's thread
    torch.set_num_threads(1)  # small products: a second thread would wait for a core that serves
    try:
        service = GateService(config)
    except (SafeLoRAError, OSError, RuntimeError) as error:
        kind = type(error).__name__ if isinstance(error, SafeLoRAError) else "ProjectorCacheError"
        print(json.dumps({"error": str(error), "type": kind}), flush=True)
        return 1
    socket_path = Path(config.socket)
    socket_path.unlink(missing_ok=True)
    handler = type("Handler", (_Handler,), {"service": service})
    with _Server(str(socket_path), handler) as server:
        for work in (server.serve_forever, service.keep_clean):
            threading.Thread(target=work, daemon=True).start()
        print(json.dumps({"result": service.state()}), flush=True)
        sys.stdin.read()  # returns when the worker closes it or is gone
        server.shutdown()
    # The worker may have been killed, so its private folder is this process's to remove.
    for leftover in (socket_path, socket_path.with_name("owner.lock")):
        leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        socket_path.parent.rmdir()
    return 0


__all__ = ["GateService", "main"]

if __name__ == "__main__":
    sys.exit(main())
