"""What ``safelora-vllm serve`` refuses before vLLM starts, which takes a minute to say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError, PolicyError
from safelora_vllm.integration.serve import _check_rules, _refuse_options
from safelora_vllm.integration.settings import ServerSettings
from safelora_vllm.policy import METHOD_NAMES
from safelora_vllm.projectors.cache import ProjectorCache


def test_front_ends_without_plugins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    _refuse_options(["--port", "8000", "--grpc-web-is-no-option"])
    with pytest.raises(GuardError, match="--grpc starts a front end"):
        _refuse_options(["--port", "8000", "--grpc"])
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    _refuse_options([])
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(GuardError, match="VLLM_USE_RUST_FRONTEND"):
        _refuse_options([])


def test_rules_that_cannot_hold(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(**policy: object) -> None:
        _check_rules(cache, ServerSettings(str(cache.folder), str(tmp_path / "store"), policy))

    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    for method in set(METHOD_NAMES) - {"safe-lora"}:
        check(method=method, energy=0.9)
        with pytest.raises(PolicyError, match="build it again with --max-energy"):
            check(method=method, energy=0.9999)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(GuardError, match="unset it"):
        check()
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    (tmp_path / "store" / "raw").mkdir(parents=True)
    (tmp_path / "store" / "raw").chmod(0o777)
    with pytest.raises(GuardError, match="chmod o-w"):
        check()


@pytest.mark.parametrize("option", ["--weight-transfer-config", "--weight_transfer_config={}"])
def test_new_weights_are_refused(option: str) -> None:
    with pytest.raises(GuardError, match="weight transfer"):
        _refuse_options([option])
    with pytest.raises(GuardError, match="weight transfer"):
        _refuse_options(["--weight-transfer-config.backend", "nccl"])
