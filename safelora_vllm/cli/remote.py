"""Adapters that a command is given as ``s3://``, ``gs://``, ``az://`` or ``https://`` addresses.

They are read with the user's own credentials. There is no allowlist: whoever types an address may go there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelora_vllm.remote.address import is_remote

REMOTE = "or its s3://, gs://, az:// or https:// address"


@contextmanager
def on_disk(adapter: str) -> Iterator[str]:
    """The path of an adapter, downloaded for as long as the block lasts if it has an address.

    Raises:
        AdapterRefused: it cannot be downloaded, with a code of docs/troubleshooting.md.
    """
    if not is_remote(adapter):
        yield adapter
        return
    from safelora_vllm.adapters.read import Limits
    from safelora_vllm.remote.address import parse
    from safelora_vllm.remote.fetch import fetch
    from safelora_vllm.remote.reach import Reach

    with tempfile.TemporaryDirectory(prefix="safelora-") as folder:
        yield str(fetch(parse(adapter), Path(folder), Limits().weights_bytes, Reach(everywhere=True)))


def shown_name(adapter: str) -> str:
    """What a report calls it: its path, or its address without the query."""
    return adapter.partition("?")[0] if is_remote(adapter) else adapter
