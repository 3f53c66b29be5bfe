"""What a caller may see of the registry. The one place where that is decided, for our routes and for vLLM's.

Every vLLM route that takes a model name looks it up in ``OpenAIServingModels.lora_requests``, whatever
its URL is, so that mapping is replaced by `CallersRequests`. Source: ``_check_model`` and
``_maybe_get_adapters`` in ``vllm/entrypoints/serve/engine/serving.py``, ``show_available_models`` in
``vllm/entrypoints/openai/models/serving.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from safelora_vllm.errors import UnknownAdapter
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.registry import Entry, Registry
from safelora_vllm.tenants.principal import Principal

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def visible(registry: Registry, who: Principal | None) -> dict[str, Entry]:
    """The entries that a caller may use; all of them for work that no request asked for."""
    return {name: entry for name, entry in registry.items() if who is None or who.may_use(name)}


def look_up(registry: Registry, who: Principal | None, name: str) -> Entry:
    """The entry of a name.

    Raises:
        UnknownAdapter: there is none that this caller may use.
    """
    check_visible(who, name)
    entry = registry.get(name)
    if entry is None:
        raise unknown(name)
    return entry


def check_visible(who: Principal | None, name: str) -> None:
    """Check that a name may exist for a caller, whether there is such an adapter or not.

    Raises:
        UnknownAdapter: this caller may not use it.
    """
    if who is not None and not who.may_use(name):
        raise unknown(name)


def unknown(name: str) -> UnknownAdapter:
    """The answer for names that do not exist, and for those that do not exist for this caller."""
    return UnknownAdapter(f"there is no adapter {name!r:.200}")


class CallersRequests(Mapping[str, "LoRARequest"]):
    """Name → LoRARequest of what the current caller may use and what is served.

    A name that exists but cannot be served now raises its error when it is looked up.

    Attributes:
        missed: is told such a name.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.missed: Callable[[str], None] = lambda _: None

    def __getitem__(self, name: str) -> LoRARequest:
        try:
            entry = look_up(self._registry, caller(), name)
        except UnknownAdapter:
            raise KeyError(name) from None
        if entry.served is None:
            self.missed(name)
        return entry.current().request

    def __contains__(self, name: object) -> bool:
        """As `Mapping` has it, but for names that are no strings."""
        return isinstance(name, str) and super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, entry in visible(self._registry, caller()).items() if entry.served])

    def __len__(self) -> int:
        return sum(1 for _ in self)
