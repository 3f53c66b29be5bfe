"""What ``safelora-vllm serve`` refuses before vLLM starts, which takes a minute to say so."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import GuardError, PolicyError, UsageError
from safelora_vllm.integration.launch import (
    _check_address,
    _check_rules,
    _refuse_options,
    _takes_most_memory,
    cpu_kv_cache_bytes,
)
from safelora_vllm.methods import METHODS
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings


def options(**given: object) -> argparse.Namespace:
    """As vLLM's parser gives them."""
    return argparse.Namespace(**{"enable_lora": True, "weight_transfer_config": None, "grpc": False, **given})


def test_options_that_leave_a_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    _refuse_options(options())
    _refuse_options(argparse.Namespace(enable_lora=True))  # a vLLM without the other two
    with pytest.raises(GuardError, match="--grpc starts a front end"):
        _refuse_options(options(grpc=True))
    with pytest.raises(GuardError, match="weight transfer"):
        _refuse_options(options(weight_transfer_config={"backend": "nccl"}))
    with pytest.raises(GuardError, match="--enable-tower-connector-lora"):
        _refuse_options(options(enable_tower_connector_lora=True))
    with pytest.raises(GuardError, match="LMCacheConnectorV1"):
        _refuse_options(options(kv_transfer_config={"kv_connector": "LMCacheConnectorV1"}))
    _refuse_options(options(kv_offloading_size=4.0, kv_offloading_backend="native"))
    _refuse_options(options(kv_offloading_size=None, kv_offloading_backend="lmcache"))  # without effect
    with pytest.raises(GuardError, match=r"LMCacheMPConnector .*--kv-offloading-backend"):
        _refuse_options(options(kv_offloading_size=4.0, kv_offloading_backend="lmcache"))
    with pytest.raises(GuardError, match="--no-enable-lora"):
        _refuse_options(options(enable_lora=False))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    _refuse_options(options())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(GuardError, match="VLLM_USE_RUST_FRONTEND"):
        _refuse_options(options())


@pytest.mark.parametrize("host", ["127.0.0.1", "", None])
def test_a_port_that_is_in_use(host: str | None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of .* in use.*: stop .* another --port"):
            _check_address(argparse.Namespace(host=host, port=port, uds=None))
        _check_address(argparse.Namespace(host=host, port=port, uds="/run/vllm.sock"))
        _check_address(argparse.Namespace(host=host, port=port, headless=True))
    _check_address(argparse.Namespace(host=host, port=port))


def test_an_address_that_is_not_this_machine() -> None:
    with pytest.raises(UsageError, match=r"port 8000 of 192\.0\.2\.1 .* --host"):
        _check_address(argparse.Namespace(host="192.0.2.1", port=8000))


def test_a_cpu_server_takes_a_few_gib_unless_its_user_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(**given: Any) -> bool:
        args = argparse.Namespace(**{"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.92, **given})
        return _takes_most_memory(args, 0.92)

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert asked()
    assert not asked(kv_cache_memory_bytes=2**30) and not asked(gpu_memory_utilization=0.5)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    assert asked()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert not asked()
    assert cpu_kv_cache_bytes(100 * 2**30) == cpu_kv_cache_bytes(16 * 2**30) == 4 * 2**30
    assert cpu_kv_cache_bytes(8 * 2**30) == 2 * 2**30


def test_rules_that_cannot_hold(cache: ProjectorCache, tmp_path: Path) -> None:
    def check(**policy: object) -> None:
        _check_rules(cache, ServerSettings(str(cache.folder), str(tmp_path / "store"), policy))

    for method in set(METHODS) - {"safe-lora"}:
        check(method=method, energy=0.9)
        with pytest.raises(PolicyError, match=r"Build it again with a `max_energy` of 0\.9999"):
            check(method=method, energy=0.9999)
    (tmp_path / "store" / "raw").mkdir(parents=True)
    (tmp_path / "store" / "raw").chmod(0o777)
    with pytest.raises(GuardError, match="chmod o-w"):
        check()


def test_a_mirrored_store_without_its_bucket(cache: ProjectorCache, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mirror").write_text("s3://bucket/x")
    for mirror in (None, "s3://bucket/other"):
        with pytest.raises(
            GuardError, match=r"mirrors s3://bucket/x, not .*: start with --store-mirror s3://"
        ):
            _check_rules(
                cache, ServerSettings(str(cache.folder), str(tmp_path / "store"), store_mirror=mirror)
            )
    known = ServerSettings(str(cache.folder), str(tmp_path / "store"), store_mirror="s3://bucket/x/")
    _check_rules(cache, known)  # its bucket is not asked
