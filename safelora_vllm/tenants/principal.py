"""A caller that was identified, and whose an adapter's name is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from safelora_vllm.errors import UsageError
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.tenants.quotas import Quota

Kind = Literal["admin", "tenant", "inference", "metrics", "anonymous", "stranger"]
RESERVED = ("versions", "rollback", "policy", "exam")  # what routes append to an adapter's name
# Types of parts of a chat message: vLLM gives chats with such a part the adapter of that name.
MODALITIES = (
    "text", "image", "audio", "video", "input", "output", "file", "prompt", "refusal", "thinking", "tool",
)  # fmt: skip
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PART_RULE = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit"


def check_name(name: str) -> None:
    """Check that an adapter can have this name: NAME (shared by all) or TENANT/NAME.

    Raises:
        UsageError: it cannot.
    """
    parts = name.split("/", 2)
    if len(parts) > 2 or not all(map(PART.fullmatch, parts)):
        raise UsageError(
            f"{name!r:.200} is not a valid adapter name: expected NAME or TENANT/NAME, each of {PART_RULE}"
        )
    if name in MODALITIES:
        raise UsageError(
            f"{name!r} is not a valid adapter name: vLLM would use it for other models' chats. Choose another"
        )
    if len(parts) == 2 and parts[1] in RESERVED:
        raise UsageError(
            f"{name!r:.200} is not a valid adapter name: it would hide a route. Choose another word after '/'"
        )


@dataclass(frozen=True)
class Principal:
    """A caller that was identified. ``key_id`` names their key and is not secret.

    sees_all: may use every adapter. `KeyRing` sets it for callers without a tenant where there are none.
    """

    kind: Kind
    key_id: str
    tenant: str | None = None
    quota: Quota = field(default_factory=Quota)
    sees_all: bool = False

    def may_use(self, name: str) -> bool:
        """Whether they may see the adapter and generate with it. Shared names have no slash."""
        if self.kind in ("metrics", "stranger"):
            return False
        return self.kind == "admin" or self.sees_all or "/" not in name or self._owns(name)

    def may_manage(self, name: str) -> bool:
        """Whether they may load, replace and unload the adapter."""
        return self.kind == "admin" or self._owns(name)

    def _owns(self, name: str) -> bool:
        return bool(self.tenant) and tenant_of(name) == self.tenant


UNAUTHENTICATED = Principal("stranger", "stranger")
