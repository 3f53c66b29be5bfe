"""Changes of the registry: what an entry had before is freed when nobody uses it any more."""

from __future__ import annotations

from dataclasses import replace

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import Unavailable, fresh_copy
from safelora_vllm.integration.server.background import Background
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.published_copies import Copy
from safelora_vllm.integration.server.registry import Entry, Registry, Served


class ServedNames:
    """The names that one API server process knows. Writer of its registry, beside the watchdog,
    which notes what files a copy has.

    unready: names that are known and cannot be served now.
    """

    def __init__(self, pool: Pool, background: Background, exam: NoExam | None = None) -> None:
        """exam: what every copy has to have passed."""
        self.registry: Registry = {}
        self.unready: set[str] = set()
        self._pool, self._background, self._exam = pool, background, exam or NoExam()

    def serve(self, entry: Entry, copy: Copy) -> None:
        """Serve a published copy under a name: whatever is served passes here."""
        if not self._exam.may_serve(entry.name, copy.key, copy.report.policy, entry.exam_override):
            return self.put(replace(entry, served=None, problem=self._exam.pending(entry.name)))
        try:
            request = self._pool.request(entry.name, copy.key, entry.first_id)
        except Unavailable as error:
            return self.put(replace(entry, served=None, problem=fresh_copy(error)))
        served = Served(request, copy.report.named(entry.name), copy.state)
        self.put(replace(entry, served=served, problem=None))
        self._exam.is_served(entry.name, copy.key, copy.report.policy)

    def put(self, entry: Entry) -> None:
        """Change what is known of a name. Weights that it had before are freed when nobody uses them."""
        before = self.registry.get(entry.name)
        self.registry[entry.name] = entry
        (self.unready.discard if entry.served else self.unready.add)(entry.name)
        if before is not None and before.served is not None:
            kept = entry.served is not None and _same(entry.served.request, before.served.request)
            if not kept:
                self._release(before.served.request)

    def drop(self, name: str) -> None:
        """Forget a name, and free its weights."""
        entry = self.registry.pop(name)
        self.unready.discard(name)
        self._exam.is_gone(name)
        if entry.served is not None:
            self._release(entry.served.request)

    def _release(self, request: LoRARequest) -> None:
        self._background.spawn(self._pool.release(request, self._wanted))

    def _wanted(self, request: LoRARequest) -> bool:
        """Whether this very version is served."""
        entry = self.registry.get(request.lora_name)
        return entry is not None and entry.served is not None and _same(entry.served.request, request)


def _same(one: LoRARequest, other: LoRARequest) -> bool:
    return bool(one.lora_int_id == other.lora_int_id)
