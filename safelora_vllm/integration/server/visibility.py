"""vLLM's map of adapter names, through which each caller sees only what he may use.

Every vLLM route that takes a model name looks it up in ``OpenAIServingModels.lora_requests``, whatever
its URL is, so this is the one place where names are hidden. Source: ``_check_model`` and
``_maybe_get_adapters`` in ``vllm/entrypoints/serve/engine/serving.py``, ``show_available_models`` in
``vllm/entrypoints/openai/models/serving.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import SafeLoRAError, again
from safelora_vllm.integration.server.callers import caller


class ServingMap(dict[str, LoRARequest]):
    """Name → LoRARequest. Reading it as a dict shows the current caller's part; `everything` all of it.

    unavailable: names that exist but cannot be served now, with the error that their users get.
    """

    def __init__(self, requests: Iterable[tuple[str, LoRARequest]] = ()) -> None:
        super().__init__(requests)
        self.unavailable: dict[str, SafeLoRAError] = {}

    def everything(self) -> dict[str, LoRARequest]:
        """A plain copy, whoever is calling."""
        return dict(dict.items(self))

    def __contains__(self, name: object) -> bool:
        if not (isinstance(name, str) and visible(name)):
            return False
        if name in self.unavailable:
            raise again(self.unavailable[name])
        return dict.__contains__(self, name)

    def __getitem__(self, name: str) -> LoRARequest:
        if not visible(name):
            raise KeyError(name)
        return dict.__getitem__(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return dict.get(self, name, default) if visible(name) else default

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in dict.keys(self) if visible(name)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def keys(self) -> Any:
        """The visible names."""
        return dict.fromkeys(self).keys()

    def values(self) -> Any:
        """The visible requests."""
        return {name: dict.__getitem__(self, name) for name in self}.values()

    def items(self) -> Any:
        """The visible pairs."""
        return {name: dict.__getitem__(self, name) for name in self}.items()


def visible(name: str) -> bool:
    """Whether the current caller may use an adapter of this name."""
    principal = caller()
    return principal is None or principal.may_use(name)
