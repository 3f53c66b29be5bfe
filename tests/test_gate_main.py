"""The gate's process from its first line to its end, and what its service does around each answer."""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from safelora_vllm.errors import (
    AdapterNotFound,
    PolicyError,
    QuotaExceeded,
    SafeLoRAError,
    StoreDamaged,
    StoreUnavailable,
    UsageError,
)
from safelora_vllm.gate import server as gate_server
from safelora_vllm.gate import service as gate_service
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import (
    Admit,
    Call,
    Ensure,
    GateConfig,
    GetMetrics,
    GetState,
    Metrics,
    decode_answer,
    encode,
)
from safelora_vllm.gate.service import GateService
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store.published import PublishedStore
from safelora_vllm.tenants.quotas import Allowance
from tests.tiny import Draft, lora_config


@pytest.fixture
def config(cache: ProjectorCache, tmp_path: Path) -> GateConfig:
    """Settings of a gate on the tiny model with a store and a folder of its own."""
    settings = ServerSettings(str(cache.folder), str(tmp_path / "store"), trust_served_model=True)
    folder = tmp_path / "instance"
    folder.mkdir()
    return GateConfig(str(folder / "gate.sock"), "models/served", settings, niceness=7)


@pytest.fixture
def service(config: GateConfig) -> GateService:
    return GateService(config)


def with_settings(config: GateConfig, **changes: Any) -> GateConfig:
    return dataclasses.replace(config, settings=dataclasses.replace(config.settings, **changes))


class Pipe:
    """The standard input that a worker holds open: settings, then nothing until the worker is gone."""

    def __init__(self, config: GateConfig, ended: threading.Event) -> None:
        self._line, self._ended = encode(config), ended

    def readline(self) -> bytes:
        return self._line

    def read(self) -> bytes:
        assert self._ended.wait(60)
        return b""


class Said(io.BytesIO):
    """The standard output, which tells each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[bytes] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_a_process_from_its_start_to_the_end_of_its_worker(
    config: GateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Any]] = []
    ended, out = threading.Event(), Said()
    pipe = SimpleNamespace(
        stdin=SimpleNamespace(buffer=Pipe(config, ended)), stdout=SimpleNamespace(buffer=out)
    )
    monkeypatch.setattr(gate_server, "sys", pipe)
    monkeypatch.setattr(gate_server.os, "nice", lambda n: done.append(("nice", n)))
    monkeypatch.setattr(gate_server.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(gate_server.os, "sched_setaffinity", lambda *of: done.append(("cores", of)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: done.append(("threads", n)))
    monkeypatch.setattr(logging, "basicConfig", lambda **given: done.append(("log", given["level"])))
    monkeypatch.setattr(gate_service, "collect_unreferenced", lambda *given: done.append(("collect", given)))
    Path(config.socket).write_text("of a gate that was killed")

    def work() -> None:
        done.append(("code", gate_server.main()))

    process = threading.Thread(target=work)
    process.start()
    try:
        end = time.monotonic() + 60
        while not out.flushed or not any(name == "collect" for name, _ in done):
            assert time.monotonic() < end and process.is_alive()
            time.sleep(0.01)
        state = decode_answer(out.flushed[-1], type(GateClient(config.socket).state()))
        assert GateClient(config.socket).state(timeout=30.0) == state
    finally:
        ended.set()
        process.join(60)
    assert done[:4] == [("log", logging.INFO), ("cores", (0, range(3))), ("threads", 1), ("nice", 7)]
    assert done[-1] == ("code", 0) and ("collect", (Path(config.settings.store), 1800.0)) in done
    assert not Path(config.socket).parent.exists(), "the worker may have been killed"


@pytest.mark.parametrize("error", [OSError("no shard"), RuntimeError("no kernel")])
def test_what_goes_wrong_at_the_start_is_said(
    error: Exception, config: GateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []

    def service(_: GateConfig) -> None:
        raise error

    given = SimpleNamespace(stdin=SimpleNamespace(buffer=io.BytesIO(encode(config))))
    monkeypatch.setattr(gate_server, "sys", given)
    for name in ("nice", "sched_setaffinity"):
        monkeypatch.setattr(gate_server.os, name, lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(gate_server, "GateService", service)
    monkeypatch.setattr(gate_server, "_say", said.append)
    assert gate_server.main() == 1
    assert (said[0].kind, said[0].message) == ("ProjectorCacheError", str(error))


def test_a_start_reads_checks_and_cleans_before_it_answers(
    config: GateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    loaded: list[tuple[Any, Any]] = []
    monkeypatch.setattr(gate_service, "check_store", lambda store: done.append(f"store {store}"))
    monkeypatch.setattr(ProjectorCache, "verify", lambda _: done.append("shards"))
    monkeypatch.setattr(ProjectorCache, "load", lambda _, *given, **parts: loaded.append((given, parts)))
    monkeypatch.setattr(gate_service, "clean", lambda store: done.append(f"clean {store}"))
    own = with_settings(config, projector_memory=2**30, policy={"method": "csulora", "energy": 0.3})
    service = GateService(dataclasses.replace(own, dtype="bfloat16", max_rank=4))
    store = config.settings.store
    assert done == [f"store {store}", "shards", f"clean {store}"]
    parts = {"operator": False, "input_energy": 0.3, "output_energy": 0.3}
    assert loaded == [((torch.device("cpu"), service._placement), parts)]
    assert service._placement.budget == 2**30
    settings = service._settings
    assert (settings.dtype, settings.base_model, settings.limits.max_rank) == (torch.bfloat16, "served", 4)


def test_more_energy_than_the_cache_has_is_told_at_the_start(config: GateConfig) -> None:
    with pytest.raises(PolicyError, match=r"`energy` 0\.99 is above the 0\.9\d+ that the projector cache"):
        GateService(with_settings(config, policy={"energy": 0.99}))


def test_of_policies_that_cannot_be_compared_the_servers_own_stays(
    service: GateService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(Draft().write(tmp_path / "adapter"))
    found = service.admit(Admit(folder, "x", {"method": "csulora", "energy": 0.5})).report.policy
    assert found.method == "input-removal" and "cannot be compared with the server's" in caplog.text
    found = service.admit(Admit(folder, "x", {"method": "csulora"}, override=True)).report.policy
    assert found.method == "csulora"


def test_a_policy_that_reads_what_the_cache_lacks_is_warned_of_and_reads_no_operator(
    config: GateConfig,
    thin: ProjectorCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(ProjectorCache, "load", lambda _self, *_, **options: loaded.append(options))
    own = with_settings(config, projectors=str(thin.folder), policy={"method": "safe-lora"})
    assert GateService(own)._placement.disk_bytes == 0
    assert loaded == [{"operator": False, "input_energy": 0.0, "output_energy": math.inf}]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("is thin, and `method` 'safe-lora' multiplies by Ĉ" in text for text in warnings) == 1


def test_what_a_caller_hears_of_a_thin_cache_does_not_name_its_folder(
    config: GateConfig, thin: ProjectorCache, tmp_path: Path
) -> None:
    service = GateService(with_settings(config, projectors=str(thin.folder)))
    call = Admit(str(Draft().write(tmp_path / "adapter")), "x", {"method": "safe-lora"}, override=True)
    answer = service.admit(call)
    assert answer.accepted_key() and answer.report.policy.method == "safe-lora"
    assert answer.report.uncertain == sum(module.uncertain for module in answer.report.modules) > 0
    assert str(thin.folder).encode() not in encode(answer)


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_its_metrics_say_whether_it_enforces(mode: str, config: GateConfig) -> None:
    service = GateService(with_settings(config, policy={"mode": mode}))
    assert samples(service)["safelora_enforcing", ()] == (mode == "enforce")


def samples(service: GateService) -> dict[tuple[str, tuple[str, ...]], float]:
    answer = service.answer(GetMetrics())
    assert isinstance(answer, Metrics)
    found = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.values()))): sample.value for sample in found}


def test_rates_of_the_cache_start_at_zero_and_content_without_a_digest_does_not_count(
    service: GateService, tmp_path: Path
) -> None:
    hit, miss = (("safelora_gate_cache_total", (outcome,)) for outcome in ("hit", "miss"))
    assert (samples(service)[hit], samples(service)[miss]) == (0, 0)
    (tmp_path / "empty").mkdir()
    assert not service.admit(Admit(str(tmp_path / "empty"), "x")).report.accepted
    assert (samples(service)[hit], samples(service)[miss]) == (0, 0)
    folder = str(Draft().write(tmp_path / "adapter"))
    for _ in range(3):
        service.admit(Admit(folder, "x"))
    assert (samples(service)[hit], samples(service)[miss]) == (2, 1)


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (StoreUnavailable("full"), 1),
        (torch.OutOfMemoryError("none"), 1),
        (QuotaExceeded("over"), 0),
        (AdapterNotFound("none"), 0),
        (UsageError("no"), 0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_counted_by_their_class_but_not_the_callers_mistakes(
    error: Exception, counted: int, service: GateService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(gate_service, "admit", failing)
    with pytest.raises(SafeLoRAError):
        service.admit(Admit("x", "x"))
    name = type(error).__name__
    found = samples(service)
    assert found.get(("safelora_loads_total", tuple(sorted(("error", name)))), 0) == counted
    assert service.state().busy_seconds == 0.0


def test_content_is_kept_only_where_it_is_asked_for(service: GateService, tmp_path: Path) -> None:
    folder = str(Draft().write(tmp_path / "adapter"))
    digest = service.admit(Admit(folder, "x", keep=False)).report.digest
    assert not service._raw.has(digest)
    service.admit(Admit(folder, "x"))
    assert service._raw.has(digest)


def test_the_store_is_kept_small_after_what_is_new_only(
    config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[object] = []
    monkeypatch.setattr(gate_service, "collect", lambda *given: collected.append(given))
    service = GateService(with_settings(config, store_bytes=77))
    folder = str(Draft().write(tmp_path / "adapter"))
    for _ in range(2):
        service.admit(Admit(folder, "x"))
    assert collected == [(Path(config.settings.store), 77)]
    GateService(config).admit(Admit(str(Draft(lora_config(lora_alpha=6)).write(tmp_path / "other")), "x"))
    assert len(collected) == 1, "without a budget nothing is removed"


def test_it_goes_on_cleaning_whatever_goes_wrong(
    service: GateService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Enough(BaseException):
        """Ends the loop that has no end."""

    errors = iter([StoreDamaged("a record"), OSError("a disk"), ValueError("a fault of ours")])
    waited: list[float] = []

    def collect(*_: object) -> None:
        for error in errors:
            raise error
        raise Enough

    monkeypatch.setattr(gate_service, "collect_unreferenced", collect)
    monkeypatch.setattr(gate_service.time, "sleep", waited.append)
    with pytest.raises(Enough):
        service.keep_clean()
    assert waited == [300.0] * 3
    assert [line for line in caplog.messages if line.startswith("unreferenced uploads are kept: ")] == [
        f"unreferenced uploads are kept: {what}" for what in ("a record", "a disk", "a fault of ours")
    ]


def test_whatever_goes_wrong_while_the_store_is_kept_small_is_logged(
    config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def collect(*_: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(gate_service, "collect", collect)
    service = GateService(with_settings(config, store_bytes=0))
    assert service.admit(Admit(str(Draft().write(tmp_path / "adapter")), "x")).report.accepted
    assert "could not be kept small" in caplog.text


def test_an_override_is_written_on_the_copy_once_it_is_made_or_found(
    service: GateService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[str] = []
    monkeypatch.setattr(PublishedStore, "mark_override", lambda _, key: marked.append(key))
    touched: list[str] = []
    monkeypatch.setattr(PublishedStore, "touch", lambda _, key: touched.append(key))
    folder, lax = str(Draft().write(tmp_path / "adapter")), {"energy": 0.1}
    made = service.admit(Admit(folder, "x", lax, override=True))
    key, digest = made.accepted_key(), made.report.digest
    assert made.report.policy.energy == 0.1 and marked == [key]
    found = service.ensure(Ensure(digest, "x", lax, override=True))
    assert found.key == key and marked == [key] * 2 and touched == [key]
    assert service.ensure(Ensure(digest, "x", lax)).report.policy.energy == 0.2
    assert marked == [key] * 2
    # The same where the copy has to be made again.
    lost = service.ensure(Ensure(digest, "x", {"energy": 0.15}, override=True))
    assert lost.report.policy.energy == 0.15 and marked[2:] == [lost.key]


def test_a_line_longer_than_a_call_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_server, "_MAX_LINE", 10)
    handler = object.__new__(gate_server._Handler)
    handler.rfile, handler.wfile = io.BytesIO(b"x" * 25), io.BytesIO()
    handler.handle()
    answers = handler.wfile.getvalue().splitlines()
    assert len(answers) == 3 and all(b"a call has at most 10 bytes" in line for line in answers)


def test_callers_do_not_wait_for_each_other_and_do_not_hold_the_process() -> None:
    kind = gate_server._Server
    assert (kind.daemon_threads, kind.request_queue_size) == (True, 128)


def test_defaults_of_calls_are_the_careful_ones() -> None:
    admit, ensure = Admit("p", "n"), Ensure("d", "n")
    assert (admit.policy, admit.override, admit.keep, admit.allowance) == ({}, False, True, None)
    assert (ensure.policy, ensure.override) == ({}, False)


FULL = Admit("p", "n", {"energy": 0.5}, True, False, Allowance(bytes=3))


@pytest.mark.parametrize("call", [FULL, Ensure("d", "n", {"energy": 0.5}, True)], ids=["admit", "ensure"])
def test_a_client_sends_all_that_it_was_given(call: Admit | Ensure, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Call] = []

    def ask(_: GateClient, call: Call, *__: object) -> None:
        asked.append(call)

    monkeypatch.setattr(GateClient, "_ask", ask)
    client = GateClient("s")
    if isinstance(call, Admit):
        client.admit(
            call.path,
            call.name,
            call.policy,
            override=call.override,
            keep=call.keep,
            allowance=call.allowance,
        )
        client.admit("p", "n")
    else:
        client.ensure(call.digest, call.name, call.policy, override=call.override)
        client.ensure("d", "n")
    assert asked == [call, type(call)(*("p" if isinstance(call, Admit) else "d", "n"))]


@pytest.mark.parametrize("call", [GetState(), GetMetrics()], ids=["state", "metrics"])
def test_a_client_waits_as_long_as_its_caller_does(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect.signature(GateClient._ask).parameters["timeout"].default == 120.0
    asked: list[object] = []

    def ask(_: GateClient, call: Call, __: object, timeout: float) -> SimpleNamespace:
        asked.append((call, timeout))
        return SimpleNamespace(text="")

    monkeypatch.setattr(GateClient, "_ask", ask)
    for given in ({}, {"timeout": 0.5}):
        ask_it: Callable[..., object] = (
            GateClient("s").state if call == GetState() else GateClient("s").metrics
        )
        ask_it(**given)
    assert asked == [(call, 120.0), (call, 0.5)]


def test_its_policy_and_what_it_is_busy_with_are_its_state(service: GateService) -> None:
    state = service.state()
    assert (state.policy, state.busy_seconds) == (Policy(), 0.0)
    with service._busy():
        time.sleep(0.01)
        assert 0.01 <= service.state().busy_seconds < 60
    with pytest.raises(ValueError, match="within"), service._busy():
        raise ValueError("within")
    assert service.state().busy_seconds == 0.0
