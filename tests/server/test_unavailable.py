"""What is out of order: the gate, the store or the engine. Callers may repeat the call."""

from __future__ import annotations

import json

import pytest

from safelora_vllm import errors
from safelora_vllm.integration.server.http_errors import error_response


@pytest.mark.parametrize(
    "name", ["Unavailable", "GateUnavailable", "MalformedMessage", "StoreUnavailable", "EngineUnavailable"]
)
def test_the_status_is_the_same(name: str) -> None:
    answer = error_response(getattr(errors, name)("out of order"))
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"
    assert json.loads(bytes(answer.body))["error"]["type"] == "ServiceUnavailableError"
