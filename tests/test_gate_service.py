"""The gate's service in this process: its limits, its store's permissions, its housekeeping."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safelora_vllm.errors import (
    AdapterRefused,
    GateUnavailable,
    GuardError,
    PolicyError,
    ProjectorCacheError,
    StoreUnavailable,
    UsageError,
)
from safelora_vllm.gate import server as gate_server
from safelora_vllm.gate import service as gate_service
from safelora_vllm.gate.admit import admit
from safelora_vllm.gate.protocol import Admit, Ensure, GateConfig, GetMetrics, GetState, Metrics, encode
from safelora_vllm.gate.service import GateService
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.audit_log import AuditLog
from tests.packing import C1, WEIGHTS, zipped
from tests.tiny import Draft, Pair

# 2,720 rows and columns in all modules of the tiny model, 512 of 4 bytes each, four times; and 16 MiB.
TINY_LIMIT = 4 * 2720 * 512 * 4 + 16 * 2**20


@pytest.fixture
def config(cache: ProjectorCache, tmp_path: Path) -> GateConfig:
    """Settings of a gate on the tiny model with a store of its own."""
    settings = ServerSettings(str(cache.folder), str(tmp_path / "store"), trust_served_model=True)
    return GateConfig(str(tmp_path / "gate.sock"), "not compared", settings)


def with_settings(config: GateConfig, **changes: Any) -> GateConfig:
    """The same with other settings of the server."""
    return dataclasses.replace(config, settings=dataclasses.replace(config.settings, **changes))


def refusal(service: GateService, path: Path) -> tuple[list[str], str]:
    """The codes of a refusal, and all that it says."""
    with pytest.raises(AdapterRefused) as refused:
        service.admit(Admit(str(path), "tenant")).accepted_key()
    return refused.value.codes, str(refused.value)


def sparse(folder: Path, size: int) -> Path:
    """An adapter with that many zeros for weights."""
    folder = Draft().write(folder)
    os.truncate(folder / WEIGHTS, 0)
    os.truncate(folder / WEIGHTS, size)
    return folder


def test_a_small_model_has_a_small_limit(config: GateConfig, tmp_path: Path) -> None:
    assert config.settings.max_adapter_bytes == 2 * 2**30
    service = GateService(config)
    codes, detail = refusal(service, sparse(tmp_path / "over", TINY_LIMIT + 1))
    assert codes == ["too_large"] and f"{TINY_LIMIT:,}" in detail
    assert refusal(service, sparse(tmp_path / "under", TINY_LIMIT))[0] == ["weights_malformed"]
    archive = tmp_path / "over.zip"
    archive.write_bytes(zipped(C1, (WEIGHTS, bytes(TINY_LIMIT + 1))))
    assert refusal(service, archive)[0] == ["too_large"]


def test_the_limit_in_the_settings_holds_where_it_is_less(config: GateConfig, tmp_path: Path) -> None:
    service = GateService(with_settings(config, max_adapter_bytes=1000))
    codes, detail = refusal(service, Draft().write(tmp_path / "adapter"))
    assert codes == ["too_large"] and "1,000 bytes" in detail


def test_the_limit_follows_the_rank(config: GateConfig, tmp_path: Path) -> None:
    service = GateService(dataclasses.replace(config, max_rank=8))
    _, detail = refusal(service, sparse(tmp_path / "over", TINY_LIMIT))
    assert f"{4 * 2720 * 8 * 4 + 16 * 2**20:,}" in detail


def test_modules_that_vllm_leaves_out_are_other_rules(config: GateConfig, tmp_path: Path) -> None:
    """Copies and verdicts of a server without the option are not this one's."""
    service = GateService(dataclasses.replace(config, target_modules=("o_proj", "k_proj")))
    codes, detail = refusal(service, Draft().write(tmp_path / "adapter"))
    assert codes == ["not_targeted"] and "--lora-target-modules has k_proj, o_proj" in detail
    assert service.state().ruleset_digest != GateService(config).state().ruleset_digest
    with pytest.raises(UsageError, match=r"has qkv_proj: expected .* such as qkv_proj, name the parts"):
        GateService(dataclasses.replace(config, target_modules=("q_proj", "qkv_proj")))


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
@pytest.mark.parametrize("place", [".", "raw", "published", "names", "incoming"])
def test_a_store_that_every_user_may_write_to_is_refused(place: str, mode: int, config: GateConfig) -> None:
    folder = Path(config.settings.store) / place
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(GuardError, match=rf"every user may write to {folder}, .* 'chmod o-w {folder}'"):
        GateService(config)
    folder.chmod(mode & ~0o002)
    GateService(config)


@pytest.mark.parametrize("error", [StoreUnavailable("full"), OSError(5, "I/O error"), RuntimeError("a bug")])
def test_housekeeping_that_fails_does_not_fail_an_accepted_adapter(
    error: Exception, config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr("safelora_vllm.gate.service.collect", failing)
    service = GateService(with_settings(config, store_bytes=1))
    with caplog.at_level(logging.ERROR, "vllm.safelora"):
        answer = service.admit(Admit(str(Draft().write(tmp_path / "adapter")), "tenant"))
    assert PublishedStore(config.settings.store).find(answer.accepted_key()) is not None
    (record,) = caplog.records
    assert "could not be kept small" in record.getMessage() and record.exc_info is not None


def test_of_a_kept_policy_stays_what_is_stricter(config: GateConfig, tmp_path: Path) -> None:
    """An admin set energy 0.5 and a small cap; then the server came to ask for more energy."""
    kept = dataclasses.asdict(Policy(energy=0.5, max_relative_norm=0.9))
    service = GateService(with_settings(config, policy={"energy": 0.6}))
    found = service.admit(Admit(str(Draft().write(tmp_path / "adapter")), "tenant", kept)).report.policy
    assert (found.energy, found.max_relative_norm) == (0.6, 0.9)


@pytest.mark.parametrize(
    "laxer", [{"max_relative_norm": 2.0}, {"max_total_norm": 2.0}, {"energy": 0.1}], ids=str
)
def test_a_kept_policy_that_is_laxer_in_one_field_needs_an_override(
    laxer: dict[str, float], config: GateConfig, tmp_path: Path
) -> None:
    """It was kept before the server's own policy was tightened."""
    service, folder = GateService(config), str(Draft().write(tmp_path / "adapter"))
    kept = {**dataclasses.asdict(Policy()), **laxer}
    held = service.admit(Admit(folder, "tenant", kept))
    published = PublishedStore(config.settings.store)
    assert held.report.policy == Policy() and not published.has_override(held.accepted_key())
    overridden = service.admit(Admit(folder, "tenant", kept, override=True))
    assert overridden.report.policy == Policy(**kept)
    assert published.has_override(overridden.accepted_key())


def test_a_policy_that_the_cache_cannot_serve_is_no_load_that_failed(
    config: GateConfig, tmp_path: Path
) -> None:
    service, adapter = GateService(config), Draft().write(tmp_path / "a")
    digest = service.admit(Admit(str(adapter), "acme/x")).report.digest
    with pytest.raises(PolicyError):
        service.ensure(Ensure(digest, "acme/x", {"energy": 1.0}))
    text = service.answer(GetMetrics())
    assert isinstance(text, Metrics) and 'result="error",tenant="acme"} 0.0' in text.text
    assert 'safelora_loads_total{reason="PolicyError"' not in text.text
    assert 'safelora_tenant_loads_total{result="accepted",tenant="acme"} 1.0' in text.text


def test_one_adapter_is_judged_at_a_time(
    config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them may take gigabytes of memory."""
    service, folder = GateService(config), str(Draft().write(tmp_path / "adapter"))
    inside, most = [], []

    def slowly(*arguments: Any) -> Any:
        inside.append(threading.get_ident())
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(threading.get_ident())
        return admit(*arguments)

    monkeypatch.setattr("safelora_vllm.gate.service.admit", slowly)
    threads = [
        threading.Thread(target=service.admit, args=(Admit(folder, f"t{number}"),)) for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4 and service.state().busy_seconds == 0.0


def test_a_damaged_shard_ends_the_start_also_where_it_would_not_be_read_before_an_adapter_comes(
    config: GateConfig, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelora_vllm.projectors.build._SHARD_BYTES", 30_000)
    folder = build(pair.base, pair.aligned, tmp_path / "cache", BuildOptions(exact=True, dtype="float32"))
    changes: dict[str, Any] = {"policy": {"method": "safe-lora"}, "projector_memory": 9_600_000}
    settings = dataclasses.replace(config.settings, projectors=str(folder), **changes)
    config = dataclasses.replace(config, settings=settings)
    GateService(config)
    last = max(folder.glob("*.safetensors"))
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(ProjectorCacheError, match=f"shard {last.name} .* its bytes are not those"):
        GateService(config)


@pytest.mark.parametrize(("device", "warmed"), [("cpu", False), ("meta", True)])
def test_a_gate_on_a_device_takes_its_memory_before_it_is_ready(
    device: str, warmed: bool, config: GateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread that has ended: what libraries hold for a thread, the next one is given."""
    seen: list[Any] = []

    def warm_up(*given: Any) -> None:
        seen.append((given[1:], torch.is_inference_mode_enabled(), threading.current_thread()))

    monkeypatch.setattr(gate_service, "warm_up", warm_up)
    GateService(dataclasses.replace(config, device=device, dtype="bfloat16", max_rank=24))
    assert bool(seen) == warmed
    for given, inference, thread in seen:
        assert given == (Policy(), torch.device(device), torch.bfloat16, 24) and inference
        assert not thread.is_alive()


def test_a_gate_whose_device_has_too_little_memory_does_not_start(
    config: GateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm_up(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gate_service, "warm_up", warm_up)
    with pytest.raises(RuntimeError, match="out of memory"):
        GateService(dataclasses.replace(config, device="meta"))


def test_too_little_memory_on_the_device_is_said_and_the_next_adapter_is_judged(
    config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, adapter = GateService(config), Draft().write(tmp_path / "adapter")

    def judge(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(GateUnavailable) as told:
        patch.setattr("safelora_vllm.gate.admit.judge", judge)
        service.admit(Admit(str(adapter), "large"))
    assert str(told.value) == (
        "the gate has too little memory on cpu for this adapter. Leave it more (a smaller "
        "--gpu-memory-utilization), or give it another device (--gate-device cpu)"
    )
    metrics = service.answer(GetMetrics())
    assert isinstance(metrics, Metrics)
    assert 'safelora_loads_total{reason="OutOfMemoryError",result="error"} 1.0' in metrics.text
    assert service.admit(Admit(str(adapter), "small")).report.accepted


@pytest.fixture
def kept(config: GateConfig, tmp_path: Path) -> tuple[GateService, str, str]:
    """A service, and the digest and key of an adapter that it has accepted."""
    service = GateService(config)
    judgement = service.admit(Admit(str(Draft().write(tmp_path / "adapter")), "tenant"))
    return service, judgement.report.digest, judgement.accepted_key()


def rot(path: Path) -> None:
    """Change a byte as a failing disk does: the file's state stays."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def _no_change_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelora_vllm.files.states", lambda paths: tuple((0, 0, 0, 0) for _ in paths))
    monkeypatch.setattr(
        "safelora_vllm.store.published.states", lambda paths: tuple((0, 0, 0, 0) for _ in paths)
    )
    monkeypatch.setattr("safelora_vllm.store.raw.states", lambda paths: tuple((0, 0, 0, 0) for _ in paths))


@pytest.mark.usefixtures("_no_change_shows")
def test_a_copy_that_rots_is_made_again_when_a_worker_could_not_read_it(
    kept: tuple[GateService, str, str],
) -> None:
    service, digest, key = kept
    weights = service._published.path(key) / WEIGHTS
    sound = weights.read_bytes()
    assert service._published.find(key) is not None
    rot(weights)
    assert service._published.find(key) is not None  # remembered
    assert service.ensure(Ensure(digest, "tenant")).key == key
    assert weights.read_bytes() == sound


@pytest.mark.usefixtures("_no_change_shows")
def test_content_that_rots_is_not_served(kept: tuple[GateService, str, str]) -> None:
    service, digest, key = kept
    assert service._raw.damaged(digest) is None
    rot(service._raw.path(digest) / WEIGHTS)
    assert service._raw.damaged(digest) is None  # remembered
    shutil.rmtree(service._published.path(key))
    with pytest.raises(StoreUnavailable, match=f"the store's content {digest} is damaged"):
        service.ensure(Ensure(digest, "tenant"))


def test_content_that_changes_before_it_is_judged_is_not_served(
    kept: tuple[GateService, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, digest, key = kept
    other = Draft().write(tmp_path / "other")
    (other / "adapter_config.json").write_bytes((other / "adapter_config.json").read_bytes() + b" ")
    monkeypatch.setattr(service._raw, "path", lambda _: other)
    monkeypatch.setattr(service._raw, "damaged", lambda *_, **__: None)
    shutil.rmtree(service._published.path(key))
    with pytest.raises(
        StoreUnavailable, match=f"the store's content {digest} has changed; upload tenant again"
    ):
        service.ensure(Ensure(digest, "tenant"))


def test_a_gate_whose_device_is_broken_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each later call would fail too, and it would answer that it is well."""
    ended: list[int] = []
    broken = type("Broken", (RuntimeError,), {})
    monkeypatch.setattr(gate_server, "_DEVICE_ERROR", (broken,))
    monkeypatch.setattr(gate_server.os, "_exit", ended.append)
    handler = object.__new__(gate_server._Handler)
    for error, code in ((ValueError("x"), []), (broken("CUDA error: an illegal memory access"), [1])):

        def answer(_: object, error: Exception = error) -> None:
            raise error

        handler.service = SimpleNamespace(answer=answer)  # type: ignore[assignment]
        assert b"GateUnavailable" in handler._answer(encode(GetState()))
        assert ended == code


def test_too_little_memory_at_the_start_is_said(config: GateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def service(_: GateConfig) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    given = SimpleNamespace(stdin=SimpleNamespace(buffer=io.BytesIO(encode(config))))
    monkeypatch.setattr(gate_server, "sys", given)
    monkeypatch.setattr(gate_server.os, "nice", lambda _: None)
    monkeypatch.setattr(gate_server.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(gate_server, "GateService", service)
    monkeypatch.setattr(gate_server, "_say", said.append)
    assert gate_server.main() == 1
    told = said[0].error()
    assert isinstance(told, GateUnavailable)
    assert str(told).startswith(
        "the gate has too little memory on cpu for its projectors and its work. Leave it"
    )


def test_a_refused_folder_of_the_command_line_is_in_the_audit_log_once(
    config: GateConfig, tmp_path: Path
) -> None:
    """vLLM asks for it at its start, and ends. A container starts again and again."""
    folder = str(Draft().write(tmp_path / "adapter"))
    audit = AuditLog(Path(config.settings.store) / "audit")
    strict = with_settings(config, policy={"max_total_norm": 1e-6})
    for _ in range(2):
        assert GateService(strict).admit(Admit(folder, "acme/x", keep=False)).key is None
        (line,) = audit.read()
    assert (line["actor"], line["action"], line["adapter"]) == ("server", "load", "acme/x")
    assert (line["decision"], line["reasons"]) == ("refused", ["total_norm"])
    assert line["policy"]["max_total_norm"] == 1e-6
    other = with_settings(config, policy={"max_total_norm": 1e-7})
    GateService(other).admit(Admit(folder, "acme/x", keep=False))
    assert len(list(audit.read())) == 2, "by other rules"
    GateService(config).admit(Admit(folder, "acme/x", keep=False)).accepted_key()
    GateService(strict).admit(Admit(folder, "acme/x"))
    assert len(list(audit.read())) == 2, "of an upload, the API server says who sent it"
