"""Changes of one name by several servers: none undoes another that it did not see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.access import Principal
from safelora_vllm.errors import AlreadyLoaded, ChangedMeanwhile
from safelora_vllm.integration.management import Manager
from safelora_vllm.store import NameStore, Version

ADMIN = Principal("admin", "ops")


@pytest.fixture
def managed(tmp_path: Path) -> Manager:
    """Management of a store, without gate and engine."""
    serving: Any = SimpleNamespace(names=NameStore(tmp_path))
    audit: Any = None
    return Manager(serving, audit, lambda _: False)


def version(digit: str, **policy: object) -> Version:
    return Version(0, digit * 64, 1, 1, 0.0, "ops", policy=policy)


def test_a_change_of_what_is_no_longer_there(managed: Manager) -> None:
    first = managed._update(ADMIN, "chat", None, version("1"))
    assert first.live.digest == "1" * 64
    tightened = managed._update(ADMIN, "chat", first, version("1", select="all"))
    with pytest.raises(ChangedMeanwhile, match="chat was changed meanwhile"):
        managed._update(ADMIN, "chat", first, version("2"))  # judged before the policy was tightened
    with pytest.raises(AlreadyLoaded):
        managed._update(ADMIN, "chat", None, version("2"))
    assert managed.serving.names.get("chat") == tightened
    managed.serving.names.update("chat", lambda _: None)
    with pytest.raises(ChangedMeanwhile):
        managed._update(ADMIN, "chat", tightened, version("2"))
    assert managed.serving.names.get("chat") is None
