"""What a worker takes from a store that other servers may write to.

The guard has its parts of a real start (store, settings, the gate's state), but no vLLM around it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import GuardError, StoreUnavailable
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.gate.protocol import Admit, GateConfig
from safelora_vllm.gate.server import GateService
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from tests.tiny import Draft

OWN = {"method": "safe-lora", "select": "number", "number": 5}
LAX = {"mode": "report-only"}


@dataclasses.dataclass
class Host:
    """A worker's guard, its gate, and an adapter that was uploaded."""

    guard: WorkerGuard
    service: GateService
    settings: GateSettings
    store: PublishedStore
    adapter: Path

    def published(self, **policy: Any) -> str:
        """The key of a copy that another server made in the same store."""
        settings = dataclasses.replace(self.settings, policy=Policy(**{**OWN, **policy}))
        key = admit(self.adapter, "tenant", settings, self.store).key
        assert key is not None
        return key

    def check(self, key: str) -> None:
        """What the worker does before it loads a copy, twice: it may not pass at the second look either."""
        for _ in range(2):
            self.guard._check_copy(key, "tenant")

    def refused(self, key: str) -> None:
        """The same, of a copy that the worker does not take."""
        for _ in range(2):
            with pytest.raises(GuardError, match=f"safelora://{key} was made by less strict rules"):
                self.guard._check_copy(key, "tenant")


@pytest.fixture
def host(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Its guard has no way to the gate, and may not list the store's names: both could stop a step."""
    monkeypatch.setattr(NameStore, "_scan", lambda _: pytest.fail("the store's records are read"))
    settings = ServerSettings(str(cache.folder), str(tmp_path / "store"), OWN, trust_served_model=True)
    service = GateService(GateConfig("unused", "served", settings))
    guard: WorkerGuard = object.__new__(WorkerGuard)
    guard._settings, guard._store = settings, PublishedStore(settings.store)
    guard._sound, guard.state = {}, service.state()
    adapter = Draft().write(tmp_path / "adapter")
    return Host(guard, service, service._settings_for({}, False), PublishedStore(settings.store), adapter)


@pytest.mark.parametrize("stricter", [{}, {"select": "all"}, {"number": 6}, {"max_total_norm": 0.9}], ids=str)
def test_a_copy_by_rules_as_strict_is_taken(stricter: dict[str, Any], host: Host) -> None:
    host.check(host.published(**stricter))


@pytest.mark.parametrize("laxer", [LAX, {"number": 4}, {"max_total_norm": 1.1}], ids=str)
def test_a_copy_by_laxer_rules_is_taken_once_an_admin_asked_for_it(laxer: dict[str, Any], host: Host) -> None:
    key = host.published(**laxer)
    host.refused(key)
    answer = host.service.admit(Admit(str(host.adapter), "tenant", {**OWN, **laxer}, override=True))
    assert answer.key == key
    host.check(key)


def test_an_override_is_for_its_copy_only(host: Host) -> None:
    other = host.published(number=4)
    host.check(host.service.admit(Admit(str(host.adapter), "x", LAX, override=True)).accepted_key())
    host.refused(other)


def test_what_a_copy_says_is_what_counts(host: Host) -> None:
    """Not what the name's record says: the worker does not read it. The gate writes it into the copy."""
    key = host.published(**LAX)
    new = Version(0, "a" * 64, 1, 4, 0.0, "ops", policy=LAX, override=True, key=key)
    NameStore(host.store.root).update("acme/x", lambda _: AdapterRecord("acme/x").with_version(new))
    host.refused(key)


@pytest.mark.parametrize("word", [1, "true", [True], None, False, {}], ids=repr)
def test_another_word_than_true_is_no_override(word: object, host: Host) -> None:
    key = host.published(**LAX)
    report = host.store.path(key) / "report.json"
    saved = json.loads(report.read_text())
    report.write_text(json.dumps({**saved, "override": word}))
    host.refused(key)
    report.write_text(json.dumps({**saved, "report": {**saved["report"], "override": True}}))
    with pytest.raises(StoreUnavailable, match="missing or damaged"):
        host.guard._check_copy(key, "tenant")


def test_a_copy_that_is_gone_has_no_override(host: Host) -> None:
    assert not host.store.has_override("0" * 64)
    with pytest.raises(StoreUnavailable, match="missing or damaged"):
        host.guard._check_copy("0" * 64, "tenant")


def test_a_tenants_files_do_not_make_an_override(host: Host) -> None:
    """Whatever an upload says of itself, the published copy has the gate's words only."""
    draft = Draft()
    draft.config["override"] = True
    folder = draft.write(host.adapter.with_name("forged"))
    (folder / "report.json").write_text(json.dumps({"override": True}))
    answer = host.service.admit(Admit(str(folder), "acme/x", LAX))
    assert answer.report.policy.enforcing
    if answer.key is not None:
        assert not host.store.has_override(answer.key)


def test_an_attestation_arrives_as_it_was_given() -> None:
    given = Attestation(True, "/socket", "p", "q", ["safelora://k"])
    assert Attestation.from_answers([given.to_dict()] * 2) == [given, given]
    for wrong in ({"guarded": False, "lora": True}, {**given.to_dict(), "guarded": False}, "generate", None):
        with pytest.raises(ValueError, match=r"guarded|Expected|missing|unknown"):
            Attestation.from_answers([given.to_dict(), wrong])
