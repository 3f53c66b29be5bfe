"""The adapter store: everything that the server keeps, under one root folder.

`layout` says what lies where.

Safe for several server processes on one root. Every change is a rename, so that a crash at any
instant leaves the old state or the new one, and perhaps a temporary folder, which
`housekeeping.clean` removes.
"""

from __future__ import annotations

from safelora_vllm.store.names import AdapterRecord, NameStore, Version
from safelora_vllm.store.published import PublishedStore
from safelora_vllm.store.raw import RawStore

__all__ = [
    "AdapterRecord",
    "NameStore",
    "PublishedStore",
    "RawStore",
    "Version",
]
