"""GET /v1/overview and GET /v1/audit: who sees what, in which state. The engine is a fake one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from safelora_vllm.errors import AdapterRefused, GateUnavailable, Reason
from safelora_vllm.integration.server.overview import _item
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.route_parts import Recorded
from safelora_vllm.store.audit_log import DECISIONS
from safelora_vllm.tenants.principal import Principal
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer
from tests.server.test_tenants import KEYS
from tests.tiny import Draft, lora, lora_config


def test_who_sees_which_adapters(fake: FakeServer, drafts: dict[str, Path]) -> None:
    admin, acme = fake.client(ADMIN_KEY), fake.client(KEYS["acme"])
    for name in ("acme/x", "globex/x", "shared"):
        assert upload(admin, name, drafts["qv"]).status_code == 201
    everything = admin.get("/v1/overview").json()
    assert everything["caller"] == {"kind": "admin", "key": "admin/environment", "tenant": None}
    assert everything["may_upload"] and everything["policy"]["select"] == "all"
    assert [a["name"] for a in everything["adapters"]] == ["acme/x", "globex/x", "shared", "static"]
    own = acme.get("/v1/overview").json()
    assert [(a["name"], a["changeable"]) for a in own["adapters"]] == [
        ("acme/x", True), ("shared", False), ("static", False),
    ]  # fmt: skip
    assert own["caller"] == {"kind": "tenant", "key": "acme/ci", "tenant": "acme"}
    x, report = own["adapters"][0], acme.get("/v1/adapters/acme/x").json()
    retained = min(module["retained"] for module in report["modules"])
    assert x["figures"] == {
        "modules": 14, "projected": 14, "least_retained": retained, "total_norm": report["total_norm"],
    }  # fmt: skip
    assert (x["state"], x["version"], x["rank"], x["method"], x["mode"]) == (
        "served",
        1,
        4,
        "safe-lora",
        "enforce",
    )
    static = own["adapters"][-1]
    assert (static["state"], static["version"], static["created"]) == ("served", None, None)
    user = fake.client(KEYS["inference"]).get("/v1/overview").json()
    assert [a["name"] for a in user["adapters"]] == ["shared", "static"]
    assert (user["may_upload"], user["policy"]) == (False, None)
    for key in (KEYS["wrong"], ""):
        assert fake.client(key).get("/v1/overview").status_code == 401


def test_figures_that_the_operator_keeps(
    fake: FakeServer, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = fake.app.state.safelora_views
    monkeypatch.setattr(fake.app.state, "safelora_views", replace(views, tenant_reports="summary"))
    assert upload(fake.client(ADMIN_KEY), "acme/x", drafts["qv"]).status_code == 201
    figures = [
        fake.client(key).get("/v1/overview").json()["adapters"][0]["figures"]
        for key in (ADMIN_KEY, KEYS["acme"])
    ]
    assert figures[0]["modules"] == 14 and figures[1] is None


def test_states_of_what_is_not_served() -> None:
    tenant, admin = Principal("tenant", "acme/ci", "acme"), Principal("admin", "admin/a")
    reasons = [Reason("total_norm", "too large")]
    refused = _item(Entry("acme/x", 1, problem=AdapterRefused(reasons)), tenant, True)
    assert (refused["state"], refused["reasons"], refused["figures"]) == ("refused", reasons, None)
    lost = Entry("acme/x", 1, problem=GateUnavailable("/srv/store is full"))
    for who, words in ((admin, "/srv/store is full"), (tenant, "being prepared")):
        item = _item(lost, who, True)
        assert item["state"] == "unavailable" and words in item["problem"]
    assert _item(Entry("acme/x", 1), admin, True)["problem"].endswith("try again in a moment")


def test_who_sees_which_decisions(fake: FakeServer, drafts: dict[str, Path], tmp_path: Path) -> None:
    admin, acme = fake.client(ADMIN_KEY), fake.client(KEYS["acme"])
    dora = Draft(lora_config(use_dora=True), lora()).write(tmp_path / "dora")
    assert upload(admin, "acme/x", drafts["qv"]).status_code == 201
    assert upload(acme, "acme/x", dora, replace=True).status_code == 422
    assert upload(admin, "globex/x", drafts["qv"]).status_code == 201
    assert upload(admin, "shared", drafts["qv"]).status_code == 201
    assert acme.delete("/v1/adapters/acme/x").status_code == 200

    def told(http, **query):  # type: ignore[no-untyped-def]
        answer = http.get("/v1/audit", params=query)
        assert answer.status_code == 200 and answer.json()["complete"] == ("limit" not in query)
        return [(r["adapter"], r["action"], r["decision"]) for r in answer.json()["records"]]

    own = [("acme/x", "delete", "removed"), ("acme/x", "upload", "refused"), ("acme/x", "upload", "accepted")]
    assert told(acme) == told(acme, adapter="acme/x") == told(admin, adapter="acme/x") == own
    assert told(acme, adapter="globex/x") == told(acme, adapter="shared") == told(acme, adapter="none") == []
    assert [name for name, _, _ in told(admin)][:2] == ["acme/x", "shared"]
    assert told(admin, limit=1) == own[:1] and told(acme, decision="refused") == own[1:2]
    assert get_args(Recorded) == DECISIONS
    for decision in DECISIONS:
        assert all(said == decision for _, _, said in told(admin, decision=decision))
    record = acme.get("/v1/audit?decision=refused").json()["records"][0]
    assert (record["actor"], record["reasons"], record["version"]) == ("acme/ci", ["dora"], None)
    for wrong in ({"limit": 0}, {"limit": 201}, {"decision": "maybe"}):
        assert acme.get("/v1/audit", params=wrong).status_code == 400
    for key in (KEYS["inference"], KEYS["wrong"], ""):
        assert fake.client(key).get("/v1/audit").status_code == 401
