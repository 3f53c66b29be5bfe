"""Tells ``safelora-vllm store``, through a file of the store, how one API server process serves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from safelora_vllm.errors import AdapterRefused, SafeLoRAError
from safelora_vllm.integration.server.published_copies import Copies
from safelora_vllm.integration.server.registry import Registry
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.store.serving import Serving, save

logger = logging.getLogger("vllm.safelora.reconcile")


class ServingState:
    """Writes the file when something has changed. root: of the store."""

    def __init__(self, registry: Registry, copies: Copies, root: Path) -> None:
        self._registry, self._copies, self._root = registry, copies, root
        self._told: Serving | None = None
        self._complaint = ""

    async def tell(self, passed_over: Mapping[str, str]) -> None:
        """Write what is the case, if it was not written last. passed_over: names, and why they are."""
        entries = [entry for entry in self._registry.values() if entry.version is not None]
        unavailable = {
            entry.name: str(entry.problem)
            for entry in entries
            if entry.problem is not None and not isinstance(entry.problem, AdapterRefused)
        } | dict(passed_over)
        names = {owner: entry.name for entry in entries for owner in [tenant_of(entry.name)] if owner}
        try:
            await asyncio.to_thread(self._tell, names, unavailable)
        except SafeLoRAError as error:  # nothing is served by this file
            if str(error) != self._complaint:
                logger.warning("'safelora-vllm store ls' does not see what is served: %s", error)
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _tell(self, names: dict[str, str], unavailable: dict[str, str]) -> None:
        server = self._copies.servers_ruleset
        found = {owner: self._copies.ruleset(name) for owner, name in names.items()}
        rulesets = {owner: ruleset for owner, ruleset in found.items() if ruleset != server}
        now = Serving(server, rulesets, unavailable)
        if now != self._told:
            save(self._root, now)
            self._told = now
