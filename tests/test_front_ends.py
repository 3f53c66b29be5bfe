"""vLLM's front ends that load no plugins would tell nobody apart."""

from __future__ import annotations

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.serve import _refuse_other_front_ends


def test_front_ends_without_plugins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    _refuse_other_front_ends(["--port", "8000", "--grpc-web-is-no-option"])
    with pytest.raises(GuardError, match="--grpc starts a front end"):
        _refuse_other_front_ends(["--port", "8000", "--grpc"])
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    _refuse_other_front_ends([])
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(GuardError, match="VLLM_USE_RUST_FRONTEND"):
        _refuse_other_front_ends([])
