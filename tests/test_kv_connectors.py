"""Connectors to caches of keys and values: only those that keep adapters apart are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams import kv_connectors


def several(*names: str) -> dict[str, Any]:
    children = [{"kv_connector": name} for name in names]
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": children}}


def offloading(settings: dict[str, Any]) -> dict[str, Any]:
    return {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": settings}


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kv_connectors.ALLOW, raising=False)


@pytest.mark.parametrize(
    "config",
    [
        None, {}, SimpleNamespace(kv_connector=None), {"kv_connector": "OffloadingConnector"},
        SimpleNamespace(kv_connector="NixlConnector", kv_connector_module_path=None),
        several("NixlConnector", "OffloadingConnector"), offloading({}),
        offloading({"secondary_tiers": [{"type": "fs"}, {"type": "obj"}]}),
    ],
)  # fmt: skip
def test_those_that_keep_adapters_apart(config: Any) -> None:
    kv_connectors.check(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"kv_connector": "LMCacheConnectorV1"}, "LMCacheConnectorV1"),
        (SimpleNamespace(kv_connector="ExampleConnector"), "ExampleConnector"),
        (several("NixlConnector", "LMCacheMPConnector"), "LMCacheMPConnector"),
        ({"kv_connector": "NixlConnector", "kv_connector_module_path": "mine"}, "mine.NixlConnector"),
        ({**several("NixlConnector"), "kv_connector_module_path": "mine"}, "mine.MultiConnector"),
        ({"kv_connector": "New"}, "New"),
        (offloading({"secondary_tiers": [{"type": "fs"}, {"type": "p2p"}]}), "OffloadingConnector.p2p"),
        (offloading({"secondary_tiers": [{"type": "Mine", "module_path": "m"}]}), "m.Mine"),
        (offloading({"spec_name": "Spec", "spec_module_path": "m"}), "m.Spec"),
    ],
)
def test_others_are_refused_until_somebody_answers_for_them(
    config: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GuardError, match=rf"the connector {named} \(.* set {kv_connectors.ALLOW}={named}$"):
        kv_connectors.check(config)
    monkeypatch.setenv(kv_connectors.ALLOW, f"Other, {named}")
    kv_connectors.check(config)
    monkeypatch.setenv(kv_connectors.ALLOW, "1")
    with pytest.raises(GuardError):
        kv_connectors.check(config)
