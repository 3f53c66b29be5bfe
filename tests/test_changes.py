"""Changes of one name by several servers: none undoes another that it did not see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from safelora_vllm.errors import AlreadyLoaded, ChangedMeanwhile, Forbidden, UsageError
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.published_copies import Copies
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.recorded import Line
from safelora_vllm.tenants.principal import Principal
from tests.tiny import Draft

ADMIN = Principal("admin", "ops")


@pytest.fixture
def managed(tmp_path: Path) -> Manager:
    """Management of a store, without gate and engine."""
    reconciler: Any = SimpleNamespace(names=NameStore(tmp_path), store=SimpleNamespace(apart=True))
    return Manager(reconciler, AuditLog(tmp_path / "audit"), lambda _: False)


def version(digit: str, **policy: object) -> Version:
    return Version(0, digit * 64, 1, 1, 0.0, "ops", policy=policy)


def test_a_change_of_what_is_no_longer_there(managed: Manager) -> None:
    names = managed.reconciler.names

    def update(before: AdapterRecord | None, new: Version) -> AdapterRecord | None:
        managed._commits.update(ADMIN, "chat", before, new, Line("ops", "upload", lambda _: {}))
        return names.get("chat")

    first = update(None, version("1"))
    assert first is not None and first.live.digest == "1" * 64
    tightened = update(first, version("1", select="all"))
    with pytest.raises(ChangedMeanwhile, match="chat was changed meanwhile"):
        update(first, version("2"))  # judged before the policy was tightened
    with pytest.raises(AlreadyLoaded):
        update(None, version("2"))
    assert names.get("chat") == tightened
    names.update("chat", lambda _: None)
    with pytest.raises(ChangedMeanwhile):
        update(tightened, version("2"))
    assert names.get("chat") is None


def test_a_copy_that_does_not_say_its_override_is_first_asked_for(gate: GateSettings, tmp_path: Path) -> None:
    """An older release made it: the gate adds what the workers want to read in it."""
    published, nothing = PublishedStore(tmp_path / "store"), cast(Any, None)
    key = admit(Draft().write(tmp_path / "adapter"), "chat", gate, published).key
    assert key is not None
    stricter = dataclasses.replace(gate.policy, max_total_norm=gate.policy.max_total_norm / 2)
    state = SimpleNamespace(ruleset_digest="r", policy=gate.policy, frame=[])
    copies = Copies(nothing, cast(Any, state), published)
    plain = dataclasses.replace(version("1"), key=key, ruleset_digest="r")
    overridden = dataclasses.replace(plain, override=True)
    found = copies.find("chat", plain)
    assert found is not None and (found.key, found.report) == (key, published.find(key))
    assert found.state == published.state(key)
    state.policy = stricter
    assert copies.find("chat", overridden) is None
    published.mark_override(key)
    found = copies.find("chat", overridden)
    assert found is not None and found.report == published.find(key)
    assert copies.find("chat", dataclasses.replace(overridden, ruleset_digest="other")) is None


def test_a_stored_adapter_with_the_base_models_name_is_not_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be older than the server's --served-model-name."""
    names, nothing = NameStore(tmp_path), cast(Any, None)
    for name in ("aligned", "chat"):
        names.update(name, lambda _, name=name: AdapterRecord(name).with_version(version("1")))
    pool, state = cast(Any, SimpleNamespace(names=names)), cast(Any, SimpleNamespace(ruleset_digest="others"))
    copies = Copies(nothing, state, PublishedStore(tmp_path))
    reconciler = Reconciler(pool, copies, 1, "aligned".__eq__, cast(Any, None))
    for _ in range(2):
        changed, records = reconciler.store.read_changes()
        assert list(records) == [record.name for record, _ in changed] == ["chat"]
    assert caplog.text.count("'aligned' is not served: the server itself has that name") == 1


def test_a_path_is_inside_of_one_of_the_operators_folders(managed: Manager, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert managed.check_root("/anywhere") == Path("/anywhere").resolve(), "where there are no such folders"
    managed.roots = (one, two)
    for inside in (one, two / "a", one / ".." / "two"):
        assert managed.check_root(str(inside)) == inside.resolve()
    for outside in (tmp_path, tmp_path / "one2", one / ".."):
        with pytest.raises(Forbidden, match="outside of the server's --adapter-root folders"):
            managed.check_root(str(outside))


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 4096], ids=["zero byte", "too long"])
def test_what_is_no_path(path: str, managed: Manager) -> None:
    with pytest.raises(UsageError, match="a path has at most 4,096 characters and no zero byte"):
        managed.check_root(path)
    managed.check_root("/x" * 2048)


def test_what_a_manager_allows_that_is_not_told(managed: Manager) -> None:
    assert (managed.roots, managed.hub) == ((), False)
    assert managed.max_adapter_bytes == ServerSettings.max_adapter_bytes == 2 * 2**30
