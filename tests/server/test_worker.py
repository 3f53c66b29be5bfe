"""What a worker takes from a store that other servers may write to, and where its gate listens.

The guard has its parts of a real start (store, settings, state, gate), but no vLLM around it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.errors import GuardError, StoreUnavailable
from safelora_vllm.files import FoundSound
from safelora_vllm.gate.admit import admit
from safelora_vllm.gate.protocol import Admit, GateConfig
from safelora_vllm.gate.service import GateService
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.worker import lora_manager
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.integration.worker.lora_manager import GuardedLoRAManager, attest
from safelora_vllm.integration.worker.pool_counts import PoolCounts
from safelora_vllm.integration.worker.read_ahead import ReadAhead
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from tests.tiny import Draft, lora

OWN = {"method": "safe-lora", "select": "number", "number": 5, "max_relative_norm": 0.9}
LAX = {"mode": "report-only"}
LAXER: list[dict[str, Any]] = [
    {"mode": "report-only"}, {"number": 4}, {"max_relative_norm": 1.0}, {"max_total_norm": 1.1},
    {"method": "input-removal", "select": "all"}, {"select": "threshold", "threshold": 1.0},
]  # fmt: skip


@dataclasses.dataclass
class Host:
    """A worker's guard, its gate, and an adapter that was uploaded."""

    guard: WorkerGuard
    service: GateService
    cache: ProjectorCache
    store: PublishedStore
    adapter: Path

    def published(self, cache: ProjectorCache | None = None, **policy: Any) -> str:
        """The key of a copy that another server made in the same store."""
        changes: dict[str, Any] = {"cache": cache or self.cache, "policy": Policy(**{**OWN, **policy})}
        settings = dataclasses.replace(self.service._settings_for({}, False), **changes)
        key = admit(self.adapter, "tenant", settings, self.store).key
        assert key is not None
        return key

    def check(self, key: str) -> None:
        """What the worker does before it loads a copy, twice: it may not pass at the second look either."""
        for _ in range(2):
            self.guard._check_copy(key, "tenant")


class Zeros:
    """An adapter of zeros."""

    def clone(self, number: int) -> str:
        return f"zeros {number}"


@pytest.fixture
def host(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Its guard has no way to the gate, and may not list the store's names: both could stop a step."""
    monkeypatch.setattr(NameStore, "_scan", lambda _: pytest.fail("the store's records are read"))
    root = str(tmp_path / "store")
    settings = ServerSettings(str(cache.folder), root, OWN, trust_served_model=True)
    service = GateService(GateConfig("unused", "not compared", settings))
    guard: WorkerGuard = object.__new__(WorkerGuard)
    guard._settings, guard._store = settings, PublishedStore(root)
    guard._taken, guard.state = FoundSound(), service.state()
    return Host(guard, service, cache, PublishedStore(root), Draft().write(tmp_path / "adapter"))


def refused(host: Host, key: str, told: str) -> None:
    for _ in range(2):
        with pytest.raises(GuardError, match=f"safelora://{key} was made {told} than this server's"):
            host.guard._check_copy(key, "tenant")


@pytest.mark.parametrize("stricter", [{}, {"select": "all"}, {"number": 6}, {"max_total_norm": 0.9}], ids=str)
def test_a_copy_by_rules_as_strict_is_taken(stricter: dict[str, Any], host: Host) -> None:
    host.check(host.published(**stricter))


@pytest.mark.parametrize("laxer", LAXER, ids=str)
def test_a_copy_by_laxer_rules_is_taken_once_an_admin_asked_for_it(laxer: dict[str, Any], host: Host) -> None:
    key = host.published(**laxer)
    refused(host, key, "by less strict rules")
    answer = host.service.admit(Admit(str(host.adapter), "tenant", {**OWN, **laxer}, override=True))
    assert answer.key == key
    host.check(key)


def test_an_override_is_for_its_copy_only(host: Host) -> None:
    other = host.published(number=4)
    host.check(host.service.admit(Admit(str(host.adapter), "x", LAX, override=True)).accepted_key())
    refused(host, other, "by less strict rules")


def test_what_a_copy_says_is_what_counts(host: Host) -> None:
    """Not what the name's record says: the worker does not read it. The gate writes it into the copy."""
    key = host.published(**LAX)
    new = Version(0, "a" * 64, 1, 4, 0.0, "ops", policy=LAX, override=True, key=key)
    NameStore(host.store.root).update("acme/x", lambda _: AdapterRecord("acme/x").with_version(new))
    refused(host, key, "by less strict rules")


@pytest.mark.parametrize("word", [1, "true", [True], None, False, {}], ids=repr)
def test_another_word_than_true_is_no_override(word: object, host: Host) -> None:
    key = host.published(**LAX)
    report = host.store.path(key) / "report.json"
    saved = json.loads(report.read_text())
    report.write_text(json.dumps({**saved, "override": word}))
    refused(host, key, "by less strict rules")
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
    without_lora = attest(SimpleNamespace(model_runner=SimpleNamespace()))
    unguarded = attest(SimpleNamespace(model_runner=SimpleNamespace(lora_manager=object())))
    for wrong in (without_lora, unguarded, {**given.to_dict(), "guarded": False}, "generate", None):
        with pytest.raises(ValueError, match=r"guarded|Expected|missing|unknown"):
            Attestation.from_answers([given.to_dict(), wrong])


def test_a_copy_made_with_other_projectors_is_not_taken(
    host: Host, build_cache: Callable[[str, str], Path]
) -> None:
    """Not even by the same rules: another pair's projectors would let anything through."""
    other = ProjectorCache(build_cache("bfloat16", "dense"))
    refused(host, host.published(cache=other), "with other projectors")
    refused(host, host.published(cache=other, select="all"), "with other projectors")


def test_a_copy_of_a_refused_adapter_is_not_taken(host: Host) -> None:
    key = host.published()
    report, folder = host.store.find(key), host.store.path(key)
    assert isinstance(report, Report)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "report.json"}
    forged = "f" * 64
    host.store.publish(forged, files, dataclasses.replace(report, accepted=False))
    refused(host, forged, "with other projectors")


@pytest.mark.parametrize("losses", ["", "/1", "/15"])
def test_a_copy_is_found_by_its_key_however_often_it_was_lost(losses: str, host: Host) -> None:
    key = host.published()
    request = LoRARequest("tenant", 1, f"safelora://{key}{losses}")
    assert host.guard.resolve(request) == key


def flip_a_bit(weights: Path) -> None:
    """In place: the file keeps its name, size and inode."""
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def other_weights(weights: Path) -> None:
    """Sound in themselves, and unprojected."""
    weights.write_bytes((Draft(tensors=lora(seed=7)).write(weights.parent / ".other") / WEIGHTS).read_bytes())


def cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip_a_bit, other_weights, cut, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("in_step", [True, False], ids=["in a step", "a load"])
def test_bytes_that_were_damaged_are_never_loaded(
    in_step: bool, damage: Callable[[Path], None], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that evicted an adapter reads its copy again. It was sound at the first reading."""
    key = host.published()
    manager: GuardedLoRAManager = object.__new__(GuardedLoRAManager)
    manager.guard, manager._in_step, manager.counts = host.guard, in_step, PoolCounts(0)
    manager.read_ahead, host.guard.lost = ReadAhead(manager._read, torch.device("cpu")), set()
    given: list[bytes] = []  # what vLLM reads

    def load(_: Any, asked: LoRARequest) -> Any:
        given.append((Path(asked.lora_path) / WEIGHTS).read_bytes())
        return "weights"

    monkeypatch.setattr(seams, "load_published", load)
    monkeypatch.setattr(GuardedLoRAManager, "_zeros", Zeros(), raising=False)
    monkeypatch.setattr(lora_manager, "_LOAD_SECONDS", 30.0)  # a busy machine may take long
    request = LoRARequest("tenant", 1, f"safelora://{key}")
    sound = (host.store.path(key) / WEIGHTS).read_bytes()
    assert manager._load_adapter(request) == "weights"
    damage(host.store.path(key) / WEIGHTS)
    for _ in range(3):
        if in_step:
            assert manager._load_adapter(request) == f"zeros {request.lora_int_id}" and host.guard.lost == {
                request.lora_path
            }
        else:
            with pytest.raises(StoreUnavailable, match="missing or damaged"):
                manager._load_adapter(request)
    assert given == [sound]
    host.service.admit(Admit(str(host.adapter), "tenant", OWN))  # the gate makes it again
    assert manager._load_adapter(request) == "weights" and given == [sound, sound]


def test_an_adapter_that_cannot_be_read_within_a_step_is_reported_as_lost(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its path, which the API servers then withdraw. Outside of a step the load fails instead."""
    manager: GuardedLoRAManager = object.__new__(GuardedLoRAManager)
    manager.guard, manager._in_step, manager.counts = host.guard, False, PoolCounts(0)
    manager.read_ahead = ReadAhead(manager._read, torch.device("cpu"))  # it has read nothing
    host.guard.lost = set()
    monkeypatch.setattr(GuardedLoRAManager, "_zeros", Zeros(), raising=False)
    request = LoRARequest("tenant", 1, f"safelora://{'0' * 64}/1")
    with pytest.raises(StoreUnavailable, match="missing or damaged"):
        manager._load_adapter(request)
    assert host.guard.lost == set()
    manager._in_step = True
    assert manager._load_adapter(request) == "zeros 1"
    assert manager.counts.failed_steps == 1
    assert host.guard.lost == {request.lora_path}


def test_a_copy_that_is_damaged_is_not_taken_though_it_once_was(host: Host) -> None:
    key = host.published()
    host.check(key)
    file = host.store.path(key) / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreUnavailable, match="missing or damaged"):
        host.guard._check_copy(key, "tenant")
    file.unlink()
    with pytest.raises(StoreUnavailable, match="missing or damaged"):
        host.guard._check_copy(key, "tenant")


class Slots:
    """vLLM's pool with one slot of two modules, where ``bad`` adapters fail at the second."""

    capacity, lora_slots = 3, 1

    def __init__(self) -> None:
        self._registered_adapters: dict[int, Any] = {}
        self._active_adapters: dict[int, None] = {}
        self.slot: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._registered_adapters)

    def list_adapters(self) -> dict[int, Any]:
        return dict(self._registered_adapters)

    def get_adapter(self, lora_id: int) -> Any:
        return self._registered_adapters.get(lora_id)

    def add_adapter(self, lora: Any) -> bool:
        self._registered_adapters[lora.id] = lora
        return True

    def remove_adapter(self, lora_id: int) -> None:
        self._registered_adapters.pop(lora_id, None)
        self._active_adapters.pop(lora_id, None)

    def activate_adapter(self, lora_id: int) -> None:
        if lora_id in self._active_adapters:
            return
        self._active_adapters.clear()
        self._active_adapters[lora_id] = None
        lora = self._registered_adapters[lora_id]
        for module in "qk":
            if lora.bad and module == "k":
                raise ValueError("cannot determine how to split lora_b")
            self.slot[module] = lora.name


@pytest.mark.parametrize("in_step", [False, True])
def test_an_adapter_that_fails_halfway_does_not_answer_with_what_another_one_left(in_step: bool) -> None:
    """vLLM has registered it by then, and would take it for loaded the next time."""

    def read(request: LoRARequest) -> Any:
        return SimpleNamespace(id=request.lora_int_id, name=request.lora_name, bad=request.lora_name == "bad")

    zeros = SimpleNamespace(clone=lambda number: SimpleNamespace(id=number, name="zeros", bad=False))
    manager: Any = object.__new__(GuardedLoRAManager)
    manager.guard, manager.counts = SimpleNamespace(lost=set()), PoolCounts(0)
    manager._adapter_manager, manager._zeros, manager._read = Slots(), zeros, read
    manager.read_ahead = SimpleNamespace(take=read, read=lambda request, _: read(request))
    other, bad = (LoRARequest(name, len(name), f"safelora://{name}") for name in ("other", "bad"))
    assert manager.add_adapter(other)
    manager._in_step = in_step
    for _ in range(2):
        if in_step:
            assert manager.add_adapter(bad) and manager._adapter_manager.slot == dict.fromkeys("qk", "zeros")
        else:
            with pytest.raises(ValueError, match="cannot determine"):
                manager.add_adapter(bad)
            assert list(manager._adapter_manager._registered_adapters) == [5]
            assert not manager._adapter_manager._active_adapters
    assert manager.guard.lost == ({"safelora://bad"} if in_step else set())
    assert manager.counts.failed_steps == in_step
    assert manager.add_adapter(other) and manager._adapter_manager.slot == dict.fromkeys("qk", "other")


@pytest.mark.parametrize("in_step", [False, True])
def test_what_fails_in_place_leaves_what_was_there_and_what_fails_at_the_start_ends_it(in_step: bool) -> None:
    """vLLM reads before it evicts; and it warms up with an adapter of its own."""

    def read(request: LoRARequest) -> Any:
        if request.lora_name == "gone":
            raise StoreUnavailable("missing")
        return SimpleNamespace(id=request.lora_int_id, name=request.lora_name, bad=request.lora_name == "bad")

    manager: Any = object.__new__(GuardedLoRAManager)
    manager.guard, manager.counts = SimpleNamespace(lost=set()), PoolCounts(0)
    manager._adapter_manager, manager._read = Slots(), read
    manager.read_ahead = SimpleNamespace(take=read, read=lambda request, _: read(request))
    assert manager.add_adapter(LoRARequest("fine", 1, "safelora://fine"))
    with pytest.raises(StoreUnavailable):
        manager.add_adapter(LoRARequest("gone", 1, "safelora://gone", load_inplace=True))
    assert (
        manager._adapter_manager.get_adapter(1).name == "fine"
        and 1 in manager._adapter_manager._active_adapters
    )
    manager._in_step = in_step
    with pytest.raises(ValueError, match="cannot determine"):
        manager.add_adapter(LoRARequest("bad", 2, "/not/a/real/path"))
    assert not manager.guard.lost


class _Pool:
    """As much of vLLM's managers as is looked at."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.lora_slots, self.capacity = slots, capacity
        self._active_adapters: dict[int, None] = {}
        self._registered_adapters: dict[int, None] = {}

    @property
    def _adapter_manager(self) -> _Pool:
        return self

    def add(self, number: int) -> None:
        for held, most in (
            (self._registered_adapters, self.capacity),
            (self._active_adapters, self.lora_slots),
        ):
            if number not in held and len(held) >= most:
                del held[next(iter(held))]
            held[number] = None


def test_loads_and_evictions_are_counted() -> None:
    pool, counts = _Pool(1, 2), PoolCounts(3)
    for number, in_step in ((1, False), (1, True), (2, False), (1, True), (3, True)):
        with counts.change(pool, number, in_step):
            pool.add(number)
    state = counts.state(pool, gate_restarts=4)
    assert (state.engine, state.slots, state.capacity, state.gate_restarts) == (3, 1, 2, 4)
    assert (state.device, state.host) == ([3], [2, 3])
    assert (state.loads, state.step_loads) == (2, 1), "1 was in host memory the second time"
    assert (state.device_evictions, state.host_evictions) == (3, 1)
    assert sum(state.load_counts) == 3
