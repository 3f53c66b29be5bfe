"""The gate as a process: answers over its socket, its restart, its end."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from safelora_vllm.errors import (
    AdapterRefused,
    GateUnavailable,
    MalformedMessage,
    PolicyError,
    ProjectorCacheError,
    QuotaExceeded,
    SafeLoRAError,
    StoreUnavailable,
    UsageError,
)
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateConfig, GateState, Judgement, decode_answer, encode
from safelora_vllm.gate.server import _MAX_LINE
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import PublishedStore, RawStore
from safelora_vllm.tenants.quotas import Allowance
from tests.tiny import Draft, Pair, lora_config


class Timeless(GateClient):
    """Its answers leave out how long the gate worked, and can be compared."""

    def admit(self, *args: Any, **kwargs: Any) -> Judgement:
        answer = super().admit(*args, **kwargs)
        assert answer.stages
        return msgspec.structs.replace(answer, stages={})

    def ensure(self, *args: Any, **kwargs: Any) -> Judgement:
        return msgspec.structs.replace(super().ensure(*args, **kwargs), stages={})


@pytest.fixture(scope="module")
def config(cache: ProjectorCache, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> GateConfig:
    """Settings of a gate on the pair; niceness 0, so that the tests do not wait."""
    folder = tmp_path_factory.mktemp("gate")
    policy = {"method": "safe-lora"}
    settings = ServerSettings(str(cache.folder), str(folder / "store"), policy)
    return GateConfig(str(folder / "gate.sock"), str(pair.aligned), settings, niceness=0)


def with_settings(config: GateConfig, **changes: Any) -> GateConfig:
    """The same with other settings of the server."""
    return dataclasses.replace(config, settings=dataclasses.replace(config.settings, **changes))


@pytest.fixture(scope="module")
def process(config: GateConfig) -> Iterator[GateProcess]:
    """A running gate, shared by the tests of this file."""
    process = GateProcess(config)
    yield process
    process.close()


@pytest.fixture
def client(process: GateProcess, config: GateConfig) -> GateClient:
    """Calls to the running gate."""
    assert process.state
    return Timeless(config.socket)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The condition's first true value; fails when it has none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        select.select([], [], [], 0.02)  # gives way to the process that is waited for
    return value


def ended(pid: int, seconds: float = 30.0) -> bool:
    """Wait for the end of a process that need not be a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def samples(text: str) -> dict[str, float]:
    """Metric with its labels → value."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_state_names_cache_policy_and_process(
    client: GateClient, process: GateProcess, cache: ProjectorCache
) -> None:
    state = client.state()
    assert state == process.state
    assert (state.projectors, state.policy) == (cache.id, Policy(method="safe-lora"))
    assert state.pid != os.getpid()


def test_admit_and_metrics(client: GateClient, config: GateConfig, tmp_path: Path) -> None:
    before = samples(client.metrics())
    folder = str(Draft().write(tmp_path / "adapter"))
    answer = client.admit(folder, "tenant")
    report = answer.report
    assert report.accepted and report.adapter == "tenant"
    assert PublishedStore(config.settings.store).find(answer.accepted_key()) == report.named("")
    assert client.admit(folder, "other").key == answer.key
    after = samples(client.metrics())
    accepted = "safelora_loads_total[('reason', ''), ('result', 'accepted')]"
    assert after[accepted] - before.get(accepted, 0) == 2
    hits = "safelora_gate_cache_total[('outcome', 'hit')]"
    assert after[hits] - before.get(hits, 0) == 1
    assert after["safelora_projector_bytes[('tier', 'device')]"] > 0
    assert after["safelora_enforcing[]"] == 1


def test_ensure_makes_a_lost_copy_again(client: GateClient, config: GateConfig, tmp_path: Path) -> None:
    admitted = client.admit(str(Draft().write(tmp_path / "adapter")), "tenant")
    shutil.rmtree(tmp_path / "adapter")  # from here on there is only what the store keeps
    digest, folder = (
        admitted.report.digest,
        PublishedStore(config.settings.store).path(admitted.accepted_key()),
    )
    sound = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert client.ensure(digest, "tenant") == admitted
    shutil.rmtree(folder)
    assert client.ensure(digest, "tenant") == admitted
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == sound


def test_ensure_under_another_policy(client: GateClient, config: GateConfig, tmp_path: Path) -> None:
    admitted = client.admit(str(Draft().write(tmp_path / "adapter")), "tenant")
    digest = admitted.report.digest
    first, second = (client.ensure(digest, "tenant", {"threshold": 0.9}) for _ in range(2))
    assert first == second and first.key != admitted.key
    assert first.ruleset_digest == admitted.ruleset_digest
    assert first.report.policy.threshold == 0.9
    report = PublishedStore(config.settings.store).find(first.accepted_key())
    assert report is not None and report.count("projected") == len(report.modules)
    assert admitted.report.count("projected") < len(report.modules)
    with pytest.raises(PolicyError):
        client.ensure(digest, "tenant", {"threshold": 9})


def test_ensure_of_what_the_store_does_not_have(
    client: GateClient, config: GateConfig, tmp_path: Path
) -> None:
    with pytest.raises(StoreUnavailable, match=f"the store has no content {'0' * 64}; upload tenant again"):
        client.ensure("0" * 64, "tenant")
    draft = Draft(config=lora_config(lora_alpha=5))
    admitted = client.admit(str(draft.write(tmp_path / "adapter")), "tenant")
    digest, raw = admitted.report.digest, RawStore(config.settings.store)
    weights = raw.path(digest) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert client.ensure(digest, "tenant") == admitted  # its copy is sound
    shutil.rmtree(PublishedStore(config.settings.store).path(admitted.accepted_key()))
    with pytest.raises(StoreUnavailable, match=r"is damaged .its content has the digest .*; upload tenant"):
        client.ensure(digest, "tenant")
    raw.remove(digest)


def test_a_refusal_is_an_answer_not_an_error(client: GateClient, tmp_path: Path) -> None:
    folder = Draft(config=lora_config(use_dora=True)).write(tmp_path / "adapter")
    answer = client.admit(str(folder), "tenant")
    assert answer.key is None and [reason.code for reason in answer.report.reasons] == ["dora"]
    with pytest.raises(AdapterRefused) as refused_as:
        answer.accepted_key()
    assert refused_as.value.reasons == answer.report.reasons
    refused = "safelora_loads_total[('reason', 'dora'), ('result', 'refused')]"
    assert samples(client.metrics())[refused] == 1


def test_errors_come_back_as_their_own_class(client: GateClient, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no adapter folder"):
        client.admit(str(tmp_path / "none"), "tenant")
    with pytest.raises(PolicyError, match="are not valid fields of a policy"):
        client.ensure("0" * 64, "tenant", {"nothing": 1})
    assert client.state()


def test_hostile_lines_do_not_end_it(client: GateClient, config: GateConfig) -> None:
    calls = (b"", b"null", b"[]", b"\xff\xfe", b"{" * 70_000, b'{"type": ["admit"]}', b'{"type": "exec"}')
    for line in (*calls, b'{"type": "state", "nothing": 1}', b'{"type": "admit", "path": 5, "name": "x"}'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(config.socket)
            connection.settimeout(30)
            connection.sendall(line + b"\n")
            with pytest.raises(MalformedMessage, match="is not a valid call of a gate"):
                decode_answer(connection.makefile("rb").readline(), GateState)
    assert client.state()


def test_a_scale_beyond_numbers_is_refused_with_valid_json(client: GateClient, tmp_path: Path) -> None:
    folder = Draft(config=lora_config(lora_alpha=1e300)).write(tmp_path / "adapter")
    report = client.admit(str(folder), "tenant").report
    assert not report.accepted
    json.dumps(report.to_dict(), allow_nan=False)


def test_many_clients_at_once(client: GateClient, tmp_path: Path) -> None:
    folders = []
    for index in range(8):
        folders.append(Draft(config=lora_config(lora_alpha=1 + index % 4)).write(tmp_path / str(index)))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: client.admit(str(path), path.name), folders))
    assert all(answer.report.accepted for answer in answers)
    assert len({answer.key for answer in answers}) == 4


def test_it_starts_again_after_a_kill(client: GateClient, process: GateProcess, tmp_path: Path) -> None:
    folder = str(Draft().write(tmp_path / "adapter"))
    key = client.admit(folder, "tenant").key
    killed = process.state.pid
    os.kill(killed, signal.SIGKILL)
    assert ended(killed)
    with pytest.raises(GateUnavailable):
        client.state()
    state = until(lambda: process.state if process.state.pid != killed else None)
    assert client.state() == state
    assert client.admit(folder, "tenant").key == key


def test_no_gate_there(tmp_path: Path) -> None:
    with pytest.raises(GateUnavailable, match="does not answer"):
        GateClient(str(tmp_path / "none.sock")).state()


def test_a_gate_that_does_not_answer_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with pytest.raises(GateUnavailable, match=r"has not answered for 0\.05 s: it is at other adapters"):
            GateClient(str(tmp_path / "s")).state(timeout=0.05)


def test_an_answer_that_is_cut_short(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, ThreadPoolExecutor(1) as pool:
        server.bind(str(tmp_path / "s"))
        server.listen()
        answer = pool.submit(GateClient(str(tmp_path / "s")).state, 30.0)
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b'{"type":"state","pid"')
        with pytest.raises(GateUnavailable, match="ended during the call"):
            answer.result()


def test_bad_settings_end_the_start_with_the_cause(config: GateConfig, pair: Pair, tmp_path: Path) -> None:
    """In this process: `GateService` is what the real one starts with."""
    from dataclasses import replace

    from safelora_vllm.gate.service import GateService

    other = replace(config, model=str(pair.base))
    wrong: list[tuple[dict[str, Any], type[SafeLoRAError], str]] = [
        ({"projectors": str(tmp_path)}, ProjectorCacheError, "no projector cache in"),
        *(
            ({"policy": {"method": method, "energy": 0.99}}, PolicyError, "`energy` 0.99 is above")
            for method in METHODS
            if method != "safe-lora"
        ),
        ({"policy": {"unknown": 1}}, PolicyError, "are not valid fields of a policy"),
        ({"projector_memory": 1}, UsageError, "`projector_memory` is 1 bytes: expected [0-9,]+ or more"),
    ]
    for changes, kind, message in wrong:
        with pytest.raises(kind, match=message):
            GateService(with_settings(config, **changes))
    with pytest.raises(ProjectorCacheError, match="is not a copy of the aligned model"):
        GateService(other)
    GateService(with_settings(other, trust_served_model=True))


def test_a_bad_cache_is_told_by_the_process(config: GateConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ProjectorCacheError, match="no projector cache in"):
        GateProcess(
            replace(with_settings(config, projectors=str(tmp_path)), socket=str(tmp_path / "gate.sock"))
        )
    assert not (tmp_path / "gate.sock").exists()


def test_settings_that_cannot_be_read_are_told_by_the_process() -> None:
    command = [sys.executable, "-m", "safelora_vllm.gate.server"]
    ended = subprocess.run(command, input=b'{"socket": 5}\n', stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == 1
    with pytest.raises(MalformedMessage, match="is not a valid configuration of a gate"):
        decode_answer(ended.stdout, GateState)


# Starts a gate, says its number, and is killed.
_PARENT = """
import os, signal, sys
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.gate.protocol import decode_config
process = GateProcess(decode_config(sys.argv[1].encode()))
print(process.state.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_when_its_parent_dies(config: GateConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    text = encode(replace(config, socket=str(tmp_path / "gate.sock"))).decode()
    # No pipe for errors: the gate inherits it, and reading it to its end would wait for the gate.
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, text], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        gate = int(parent.stdout.readline())
        assert parent.wait(60) == -signal.SIGKILL
    assert ended(gate)


def test_only_an_override_makes_the_policy_less_strict(
    client: GateClient, config: GateConfig, tmp_path: Path
) -> None:
    """What was tightened under an older, laxer policy of the server gives way to the present one."""
    folder = str(Draft(lora_config(lora_alpha=3)).write(tmp_path / "adapter"))
    plain, published = client.admit(folder, "tenant"), PublishedStore(config.settings.store)
    lax, digest = {"threshold": 0.1}, plain.report.digest
    assert client.admit(folder, "tenant", lax) == plain
    assert client.ensure(digest, "tenant", lax) == plain
    assert not published.has_override(plain.accepted_key())
    other = client.ensure(digest, "tenant", lax, override=True)
    assert plain.key != other.key and other.report.policy.threshold == 0.1
    assert published.has_override(other.accepted_key())
    assert client.ensure(digest, "tenant", lax) == plain, "it is for who asks with an override"


def test_a_copy_that_does_not_say_its_override_gets_it(
    client: GateClient, config: GateConfig, tmp_path: Path
) -> None:
    """As an older release left it, or a server with a laxer policy."""
    folder = str(Draft(lora_config(lora_alpha=3.5)).write(tmp_path / "adapter"))
    lax, published = {"mode": "report-only"}, PublishedStore(config.settings.store)
    first = client.admit(folder, "tenant", lax, override=True)
    report = published.path(first.accepted_key()) / "report.json"
    whole = json.loads(report.read_text())
    for ask in (
        lambda: client.admit(folder, "tenant", lax, override=True),
        lambda: client.ensure(first.report.digest, "tenant", lax, override=True),
    ):
        report.write_text(json.dumps({name: whole[name] for name in whole if name != "override"}))
        assert not published.has_override(first.accepted_key())
        assert ask() == first
        assert published.has_override(first.accepted_key()) and json.loads(report.read_text()) == whole
        assert published.find(first.accepted_key()) == first.report.named("")


def test_an_allowance_is_checked_before_anything_is_stored(
    client: GateClient, config: GateConfig, tmp_path: Path
) -> None:
    folder = Draft(lora_config(lora_alpha=5)).write(tmp_path / "adapter")
    store = Path(config.settings.store)
    client.admit(str(Draft().write(tmp_path / "other")), "tenant")
    before = {path for place in ("raw", "published") for path in (store / place).iterdir()}
    for allowance in (Allowance(bytes=1000), Allowance(rank=3)):
        with pytest.raises(QuotaExceeded, match="over the tenant's quota"):
            client.admit(str(folder), "tenant", allowance=allowance)
    assert {path for place in ("raw", "published") for path in (store / place).iterdir()} == before
    answer = client.admit(str(folder), "tenant", allowance=Allowance(bytes=10**6, rank=4))
    owned = Allowance(bytes=0, owned=[answer.report.digest])
    assert client.admit(str(folder), "tenant", allowance=owned) == answer
    with pytest.raises(QuotaExceeded):  # also of what others have uploaded
        client.admit(str(folder), "tenant", allowance=Allowance(rank=3))


def test_a_tenant_may_own_thousands_of_contents(client: GateClient, tmp_path: Path) -> None:
    folder = Draft(lora_config(lora_alpha=6)).write(tmp_path / "adapter")
    owned = [f"{number:064x}" for number in range(20_000)]
    allowance = Allowance(bytes=10**6, owned=owned)
    answer = client.admit(str(folder), "tenant", allowance=allowance)
    assert answer.report.accepted


def test_a_call_without_end_is_told_so(client: GateClient) -> None:
    assert _MAX_LINE > 20_000 * 67, "digests with quotes and a comma"
    with pytest.raises(SafeLoRAError, match=r"a call has at most|does not answer"):
        client.admit("x" * (_MAX_LINE + 1), "tenant")
    assert client.state()


def test_unreferenced_uploads_are_removed_after_a_while(config: GateConfig, tmp_path: Path) -> None:
    """What was uploaded and removed again counts for no quota, so it must not stay either."""
    own = with_settings(config, store=str(tmp_path / "store"))
    own = dataclasses.replace(own, socket=str(tmp_path / "gate.sock"))
    raw = RawStore(own.settings.store)
    process = GateProcess(own)
    try:
        client = GateClient(own.socket)
        kept, old = (
            client.admit(str(Draft(lora_config(lora_alpha=alpha)).write(tmp_path / f"{alpha}")), "n")
            for alpha in (7, 8)
        )
    finally:
        process.close()
    digests = [answer.report.digest for answer in (kept, old)]
    long_ago = time.time() - 3600
    for path in (raw.path(digests[1]), PublishedStore(own.settings.store).path(old.accepted_key())):
        for file in (path, *path.iterdir()):
            os.utime(file, (long_ago, long_ago))
    process = GateProcess(own)
    try:
        until(lambda: not raw.has(digests[1]))
        assert raw.has(digests[0]), "it may be about to get its name"
    finally:
        process.close()


def test_a_gate_that_hangs_is_replaced(
    config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file: it replaces the shared gate too."""
    monkeypatch.setattr("safelora_vllm.gate.supervisor._LOOK_SECONDS", 0.2)
    monkeypatch.setattr("safelora_vllm.gate.supervisor._ANSWER_SECONDS", 1.0)
    own = dataclasses.replace(config, socket=str(tmp_path / "gate.sock"))
    process, client = GateProcess(own), GateClient(own.socket)
    try:
        first = process.state.pid
        os.kill(first, signal.SIGSTOP)
        until(lambda: process.state.pid != first)
        assert client.state().pid == process.state.pid
        second = process.state.pid
        time.sleep(1.0)
        assert process.state.pid == second, "one that answers stays"
        # As if it were at one adapter for longer than anybody waits.
        monkeypatch.setattr("safelora_vllm.gate.supervisor._ADAPTER_SECONDS", -1.0)
        until(lambda: process.state.pid != second)
    finally:
        process.close()
