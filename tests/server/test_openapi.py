"""Our routes as documented in /openapi.json, tried by schemathesis against the live server."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server import Server

from tests.server.conftest import ADMIN_KEY

pytestmark = pytest.mark.server


def test_routes_do_what_they_document(server: Server) -> None:
    """No 500, no undocumented status, no answer outside of its schema."""
    url = f"{server.url}/openapi.json"
    schema = schemathesis.openapi.from_url(url, headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    ours = schema.include(path_regex="^/v1/(adapters|load_lora_adapter|unload_lora_adapter)")
    count = 0
    for operation in ours.get_all_operations():
        count += 1

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def try_it(case: schemathesis.Case) -> None:
            case.call_and_validate(
                headers={"Authorization": f"Bearer {ADMIN_KEY}"},
                timeout=60,
                excluded_checks=[positive_data_acceptance],  # no schema says what makes an adapter
            )

        try_it()
    assert count >= 9


def test_docs_are_there(user: httpx.Client) -> None:
    paths = user.get("/openapi.json").json()["paths"]
    upload = paths["/v1/adapters"]["post"]
    assert set(upload["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert {"201", "400", "401", "403", "409", "413", "422", "429", "503"} <= set(upload["responses"])
