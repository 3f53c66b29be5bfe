"""What the servers of a store last said of how they serve it: ``serving.json``, for the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from safelora_vllm.files import make_folder, replace_file, writing
from safelora_vllm.store.layout import SERVING
from safelora_vllm.store.name_record import AdapterRecord, tenant_of


class State(NamedTuple):
    """Whether a name is served, in a word, and why not."""

    word: str
    why: str = ""


@dataclass(frozen=True)
class Serving:
    """What a server says.

    Attributes:
        ruleset: digest of the server's rules, by which names are judged whose tenant is not in ``rulesets``.
        rulesets: tenant → digest of the rules by which adapters of the tenant are judged.
        unavailable: name → why it cannot be served now, though nothing was refused.
        written: seconds since 1970.
    """

    ruleset: str
    rulesets: Mapping[str, str] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    written: float = 0.0

    def state(self, record: AdapterRecord) -> State:
        """Of a name of the store."""
        live, why = record.live, self.unavailable.get(record.name)
        if live.ruleset_digest != self.rulesets.get(tenant_of(record.name), self.ruleset):
            return State("being judged", why or "the rules have changed")
        if why:
            return State("unavailable", why)
        if live.refused:
            return State("refused", "; ".join(f"[{r.code}] {r.message}" for r in live.refused))
        return State("served")


def unknown_state(record: AdapterRecord) -> State:
    """Of a name in a store that no server of this release has served yet."""
    return State("refused" if record.live.refused else "unknown")


def save(root: Path, serving: Serving) -> None:
    """Say it to whoever looks.

    Raises:
        StoreUnavailable: the disk is full or not writable.
    """
    with writing(root):
        make_folder(root)
        replace_file(
            root / SERVING, json.dumps({**asdict(serving), "written": time.time()}, indent=1).encode()
        )


def load(root: Path) -> Serving | None:
    """What was said last; None where nobody did, or it is damaged."""
    try:
        return Serving(**json.loads((root / SERVING).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
