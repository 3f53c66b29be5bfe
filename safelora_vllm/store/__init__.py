"""The adapter store: everything that the server keeps, under one root folder.

    incoming/<random>/         uploads being received
    raw/<digest>/              what tenants uploaded and the gate accepted: config and weights
    published/<key>/           what the gate made of it; can be made again from raw
    names/<quoted name>.json   which content is served under a name, with its versions

Safe for several server processes on one root. Every change is a rename, so that a crash at any
instant leaves the old state or the new one, and perhaps a temporary folder, which
`housekeeping.clean` removes.
"""

from __future__ import annotations

import os
from pathlib import Path

from safelora_vllm.adapters.read import content_digest
from safelora_vllm.store.names import AdapterRecord, NameStore, Version
from safelora_vllm.store.published import PublishedStore
from safelora_vllm.store.raw import RawStore


def default_root() -> Path:
    """``$XDG_DATA_HOME/safelora-vllm``, by default ``~/.local/share/safelora-vllm``."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "safelora-vllm"


__all__ = [
    "AdapterRecord",
    "NameStore",
    "PublishedStore",
    "RawStore",
    "Version",
    "content_digest",
    "default_root",
]
