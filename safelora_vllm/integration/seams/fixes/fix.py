"""What a mended bug of vLLM is, and how something of vLLM is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safelora_vllm.integration.seams.table import Seam, Side

VLLM = "https://github.com/vllm-project/vllm"

_originals: dict[tuple[Any, str], Any] = {}


@dataclass(frozen=True, kw_only=True)
class Fix(Seam):
    """A bug of vLLM that is mended in every process with the plugin.

    Attributes:
        why: what is wrong in vLLM.
        until: what vLLM has to do so that the fix can go.
        upstream: the issue or change in vLLM, by its address, or "none found".
        apply: puts the fix into this process; called once.
        safety: why safety depends on it; empty for a fix that can be switched off. Safety is whose weights
            and whose data an answer is made of, and whether the guard learns of it.
        fixed_in: first version of vLLM that does not need it, which is left as it is.
    """

    upstream: str
    apply: Callable[[], None]
    side: Side = "worker"
    safety: str = ""
    fixed_in: tuple[int, int] | None = None


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or module of vLLM, and remember vLLM's own for `original`."""
    _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, value)


def original(owner: Any, name: str) -> Any:
    """The attribute as vLLM has it, replaced or not; for tests that show whether a fix is still needed."""
    return _originals.get((owner, name), getattr(owner, name))
