"""How a worker's guard begins, what it remembers, and what it installs. No engine and no gate run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm import envs
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from safelora_vllm.errors import GateUnavailable, GuardError
from safelora_vllm.files import FoundSound
from safelora_vllm.gate.protocol import GateConfig, GateState
from safelora_vllm.integration import adapter_uri, plugin
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.seams import checks, fixes
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.seams.table import ATTEST, PREPARE
from safelora_vllm.integration.worker import guard as guarded
from safelora_vllm.integration.worker import read_ahead
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.integration.worker.lora_manager import GuardedLoRAManager, attest, prepare
from safelora_vllm.policy import Policy
from safelora_vllm.settings import ServerSettings

STATE = GateState("p" * 64, Policy(), "r" * 64, "/store", 1, 0.0)


class Host:
    """What a guard is given and makes: notes what it does, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.steps: list[Any] = []
        self.lock: object | None = object()
        self.silent = 0  # questions that the gate does not answer
        self.waits: list[float] = []
        self.now = 0.0
        self.located: list[str] = []
        self.configs: list[tuple[GateConfig, dict[str, str]]] = []
        self.settings: dict[str, Any] = {"projectors": "/cache", "store": str(tmp_path / "store")}
        self.model = SimpleNamespace(model="org/model", revision=None)
        self.load_format = "auto"
        self.lora = SimpleNamespace(lora_dtype=torch.bfloat16, max_lora_rank=24)
        host = self

        class Client:
            def __init__(self, socket: str) -> None:
                self.socket_path = socket

            def state(self, timeout: float) -> GateState:
                host.steps.append(("state", timeout))
                host.silent -= 1
                if host.silent >= 0:
                    raise GateUnavailable("nobody listens")
                return STATE

        class Process:
            def __init__(self, config: GateConfig, environment: dict[str, str]) -> None:
                host.steps.append("start")
                host.configs.append((config, environment))

        def sleep(seconds: float) -> None:
            host.waits.append(seconds)
            host.now += seconds

        monkeypatch.setenv("VLLM_PLUGINS", "safelora")
        monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
        monkeypatch.setattr(guarded, "GateClient", Client)
        monkeypatch.setattr(guarded, "GateProcess", Process)
        monkeypatch.setattr(guarded, "locate_model", self.located.append)
        monkeypatch.setattr(guarded, "remove_leftovers", lambda: self.steps.append("leftovers"))
        monkeypatch.setattr(guarded, "private_folder", lambda instance: tmp_path / f"safelora-{instance}")
        monkeypatch.setattr(guarded, "take_ownership", lambda _: self.lock)
        monkeypatch.setattr(guarded.time, "sleep", sleep)
        monkeypatch.setattr(guarded.time, "monotonic", lambda: self.now)

    def guard(self, device: str = "cpu") -> WorkerGuard:
        config = SimpleNamespace(
            weight_transfer_config=None,
            kv_transfer_config=None,
            additional_config={"safelora": self.settings},
            instance_id="i1",
            model_config=self.model,
            load_config=SimpleNamespace(load_format=self.load_format),
            lora_config=self.lora,
        )
        return WorkerGuard(config, torch.device(device))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(monkeypatch, tmp_path)


def test_the_first_worker_starts_the_gate(host: Host, tmp_path: Path) -> None:
    guard = host.guard()
    assert host.steps == ["leftovers", "start", ("state", 10.0)]
    ((config, environment),) = host.configs
    assert config == GateConfig(
        str(tmp_path / "safelora-i1" / "gate.sock"), "org/model", ServerSettings(**host.settings), "cpu",
        "bfloat16", 24,
    )  # fmt: skip
    assert environment == {}
    assert host.located == ["org/model"], "the gate has no token with which to download it"
    assert guard._owner_lock is host.lock, "the gate is its own for as long as it lives"
    assert guard.lost == set()
    guard.lost |= {"safelora://b", "safelora://a"}
    told = guard.attestation(pool := PoolState(slots=2)).to_dict()
    assert told.pop("pool") == msgspec.to_builtins(pool) and told == {
        "guarded": True, "socket": config.socket, "projectors": STATE.projectors, "policy": STATE.policy.id,
        "lost": ["safelora://a", "safelora://b"],
    }  # fmt: skip


@pytest.mark.parametrize(("given", "told"), [(["q_proj", "o_proj"], ("q_proj", "o_proj")), (None, ())])
def test_the_gate_is_told_which_modules_vllm_applies(
    given: list[str] | None, told: tuple[str, ...], host: Host
) -> None:
    host.lora.target_modules = given
    host.guard()
    assert host.configs[0][0].target_modules == told


@pytest.mark.parametrize(
    ("revision", "local", "expected"),
    [("main", False, "{model}@main"), ("main", True, "{model}"), (None, False, "{model}")],
)
def test_the_gate_is_told_which_model_is_served(
    revision: str | None, local: bool, expected: str, host: Host, tmp_path: Path
) -> None:
    model = str(tmp_path) if local else "org/model"
    host.model = SimpleNamespace(model=model, revision=revision)
    host.guard()
    assert host.configs[0][0].model == expected.format(model=model)


@pytest.mark.parametrize("form", ["dummy", "pt", "npcache", "sharded_state", "mistral", "tensorizer"])
def test_weights_that_are_not_the_models_are_not_guarded(form: str, host: Host) -> None:
    host.load_format = form
    with pytest.raises(GuardError, match=f"load_format is {form}: vLLM would load other weights"):
        host.guard()
    assert "start" not in host.steps
    host.settings["trust_served_model"] = True
    host.guard()


def test_the_gate_may_have_another_device_than_the_worker(host: Host) -> None:
    host.settings["gate_device"] = "xpu:1"
    host.guard()
    assert host.configs[0][0].device == "xpu:1"


def test_a_gate_that_does_not_start_is_not_waited_for(host: Host) -> None:
    host.silent = 1
    with pytest.raises(GuardError, match="this worker has no gate: nobody listens"):
        host.guard()
    assert host.waits == []


def test_other_workers_wait_a_quarter_of_an_hour_for_the_gate(host: Host) -> None:
    """It reads the projectors meanwhile."""
    host.lock, host.silent = None, 50
    host.guard()
    assert host.configs == [] and host.waits == [0.1] * 50
    host.silent, host.waits = 10**9, []
    with pytest.raises(GuardError, match="this worker has no gate"):
        host.guard()
    assert sum(host.waits) == pytest.approx(900, abs=0.2)


class Store:
    """A published store with one copy, which notes what is asked."""

    def __init__(self) -> None:
        self.touched: list[str] = []
        self.forgotten: list[str] = []

    def touch(self, key: str) -> None:
        self.touched.append(key)

    def forget(self, key: str) -> None:
        self.forgotten.append(key)


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A guard whose gate admits every folder under a new key; `admitted` has what it was given."""
    guard: Any = object.__new__(WorkerGuard)
    guard._accepted, guard._store, guard._taken = {}, Store(), FoundSound()
    guard._settings = ServerSettings("projectors")
    guard.admitted = []

    def admit(*arguments: object, **named: object) -> Any:
        guard.admitted.append((*arguments, named))
        return SimpleNamespace(accepted_key=lambda: f"key{len(guard.admitted)}")

    guard._client = SimpleNamespace(admit=admit)
    guard.checked = []
    monkeypatch.setattr(WorkerGuard, "_check_copy", lambda self, key, name: self.checked.append((key, name)))
    return guard


def test_a_folder_passes_the_gate_once_and_is_checked_each_time(resolving: Any) -> None:
    request = LoRARequest("x", 1, "/adapters/x")
    assert [resolving.resolve(request) for _ in range(2)] == ["key1"] * 2
    assert resolving.admitted == [("/adapters/x", "x", {"keep": False})]
    assert resolving.checked == [("key1", "x")] * 2
    assert resolving._store.touched == ["key1"] * 2, "a copy that is used is not cleaned away"


@pytest.mark.parametrize(
    "other",
    [
        LoRARequest("y", 1, "/adapters/x"), LoRARequest("x", 2, "/adapters/x"),
        LoRARequest("x", 1, "/adapters/y"), LoRARequest("x", 1, "/adapters/x", load_inplace=True),
    ],
    ids=["name", "id", "path", "in place"],
)  # fmt: skip
def test_another_request_passes_the_gate_again(other: LoRARequest, resolving: Any) -> None:
    assert resolving.resolve(LoRARequest("x", 1, "/adapters/x")) == "key1"
    assert resolving.resolve(other) == "key2"


def test_a_published_copy_does_not_pass_the_gate(resolving: Any) -> None:
    assert adapter_uri.SCHEME == "safelora://"
    assert resolving.resolve(LoRARequest("x", 1, "safelora://key/3", load_inplace=True)) == "key"
    assert resolving.admitted == [] and resolving._accepted == {}
    assert resolving.checked == [("key", "x")] and resolving._store.touched == ["key"]


def test_a_copy_that_could_not_be_read_is_forgotten_everywhere(resolving: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    resolving._taken.add("key", guarded.states([file]))
    assert resolving._taken.has("key", [file])
    resolving.forget("key")
    assert not resolving._taken.has("key", [file]) and resolving._store.forgotten == ["key"]


def test_a_copy_that_is_exchanged_while_it_is_checked_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("whole")

    def find(_: str) -> str:
        file.write_text("exchanged behind the check")
        return "a report"

    guard: Any = object.__new__(WorkerGuard)
    guard._taken, guard._store = FoundSound(), SimpleNamespace(files=lambda _: [file], find=find)
    monkeypatch.setattr(WorkerGuard, "_check_rules", lambda *_: None)
    guard._check_copy("key", "x")
    assert not guard.still_sound("key")
    guard._check_copy("key", "x")
    assert not guard.still_sound("key"), "it was exchanged again"
    guard._store.find = lambda _: "a report"
    guard._check_copy("key", "x")
    assert guard.still_sound("key")


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_ends_whatever_happens_in_it(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next load by request would serve zeros instead of saying what is wrong."""
    manager: Any = object.__new__(GuardedLoRAManager)
    manager._in_step = False
    seen: list[bool] = []

    def inner(self: Any, requests: set[Any], mapping: object) -> None:
        seen.append(self._in_step)
        assert (requests, mapping) == ({1}, "mapping")
        if fails:
            raise RuntimeError("in the step")

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "set_active_adapters", inner)
    if fails:
        with pytest.raises(RuntimeError, match="in the step"):
            manager.set_active_adapters({1}, "mapping")
    else:
        manager.set_active_adapters({1}, "mapping")
    assert seen == [True] and manager._in_step is False


@pytest.mark.parametrize(
    ("modules", "kept"),
    [
        (["layers.0.mlp.experts", "layers.0.o_proj", "layers.1.o_proj"], ["layers.0.o_proj"]),
        (["layers.0.mlp.experts"], ["layers.0.mlp.experts"]),
    ],
    ids=str,
)
def test_zeros_have_the_least_rank_and_one_plain_module(modules: list[str], kept: list[str]) -> None:
    given: list[Any] = []

    def made(*arguments: Any) -> Any:
        given.append(arguments)
        return SimpleNamespace(loras={name: SimpleNamespace(lora_a=[0.0]) for name in modules})

    inner = SimpleNamespace(get_dummy_lora_warmup_rank=lambda least: 100 + least, create_dummy_lora=made)
    zeros = seams.zeros(SimpleNamespace(_adapter_manager=inner, embedding_modules={"embed": "x"}))
    assert given == [(1, 101, {"embed": "x"})] and list(zeros.loras) == kept


def test_what_is_installed_in_every_process() -> None:
    from vllm.lora import worker_manager
    from vllm.v1.worker import lora_model_runner_mixin
    from vllm.v1.worker.worker_base import WorkerBase

    for _ in range(2):
        plugin.register()
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is GuardedLoRAManager
    assert (ATTEST, PREPARE) == ("safelora_attest", "safelora_prepare")
    assert getattr(WorkerBase, ATTEST) is attest and getattr(WorkerBase, PREPARE) is prepare
    unguarded: Any = object.__new__(LRUCacheWorkerLoRAManager)
    assert worker_manager.WorkerLoRAManager._load_adapter is LRUCacheWorkerLoRAManager._load_adapter
    with pytest.raises(GuardError, match=r"LRUCacheWorkerLoRAManager is not guarded .* x is not loaded"):
        unguarded._load_adapter(LoRARequest("x", 1, "/adapters/x"))
    assert seams._original_load is not worker_manager.WorkerLoRAManager._load_adapter


def test_a_process_is_mended_after_it_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(checks, "check", lambda side: steps.append(side))
    monkeypatch.setattr(checks, "release", lambda: (0, 31))
    monkeypatch.setattr(seams, "install", lambda *given: steps.append(given))
    monkeypatch.setattr(fixes, "apply", lambda version: steps.append(version))
    plugin.register()
    assert steps == ["worker", (GuardedLoRAManager, attest, prepare), (0, 31)]


def test_vllm_finds_the_endpoint_by_its_name_and_for_every_task() -> None:
    made = plugin.endpoint()
    assert made.name == "safelora" and made.required_tasks is None


def test_the_variable_that_opens_vllms_loading_routes_is_looked_at(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
    with pytest.raises(GuardError, match="has not loaded safelora"):
        host.guard()
    assert host.steps == []


def test_how_much_is_read_ahead() -> None:
    """Each takes its size in memory, and one thread reads them beside the engine's steps."""
    assert (read_ahead._KEPT, read_ahead._FORGOTTEN_SECONDS) == (4, 10.0)
    ahead = read_ahead.ReadAhead(lambda _: None, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    assert ahead._thread._max_workers == 1


def test_the_extension_class_installs_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM does not load plugins, the class is all that it imports of this package."""
    installed: list[bool] = []
    monkeypatch.setattr("safelora_vllm.integration.plugin.register", lambda: installed.append(True))
    monkeypatch.delitem(sys.modules, "safelora_vllm.integration.required", raising=False)
    assert importlib.import_module("safelora_vllm.integration.required").Guard and installed == [True]
