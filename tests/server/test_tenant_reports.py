"""What tenants are told of an adapter's figures, and what the audit log is told of ``--lora-modules``."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, TENANT_KEYS, upload, write_keys
from tests.server.fake_server import Place


@pytest.mark.parametrize("told", ["full", "summary"])
def test_modules_are_for_admins_or_for_all(
    told: str, cache: ProjectorCache, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path) as place:
        keys = str(write_keys(place.keys))
        with place.server(api_key=INFERENCE_KEY, keys=keys, tenant_reports=told) as server:
            tenant, admin, user = map(server.client, (TENANT_KEYS["acme"], ADMIN_KEY, INFERENCE_KEY))
            reports = [upload(tenant, "acme/x", drafts["qv"]), upload(admin, "shared", drafts["qv"])]
            reports.append(upload(tenant, "acme/x", drafts["other"], replace=True))
            reports.append(tenant.post("/v1/adapters/acme/x/rollback", json={"version": 1}))
            reports += [http.get("/v1/adapters/shared") for http in (tenant, user, admin)]
            counts = [len(answer.json()["modules"]) for answer in reports]
            assert {
                answer.json()["traffic"] and answer.json()["traffic"]["requests"] for answer in reports
            } <= {None, 0}
            metrics = server.app.state.safelora_metrics
            metrics.count_now()
            for name in ("acme/x", "shared"):
                metrics.traffic.ended(name, "stop")
                metrics.traffic.refused(name)
            seen = {
                (who, name): http.get(f"/v1/adapters/{name}").json()["traffic"]
                for who, http in (("tenant", tenant), ("user", user), ("admin", admin))
                for name in ("acme/x", "shared")
                if (who, name) != ("user", "acme/x")
            }
    one = {"requests": 1, "generated_tokens": 0, "running": 0, "waiting": 0, "second_opinion_refusals": 1}
    mine = ("tenant", "acme/x"), ("admin", "acme/x"), ("admin", "shared")
    assert seen == {who: one if who in mine else None for who in seen}  # what is shared tells of others
    own = 14 if told == "full" else 0
    assert counts == [own, 14, own, own, own, own, 14]
    figures = [answer.json()["figures"] for answer in reports]
    assert [bool(found) for found in figures] == [bool(count) for count in counts]
    for found, answer in zip(figures, reports, strict=True):
        modules = answer.json()["modules"]
        assert not found or found == {
            "modules": 14,
            "projected": sum(module["decision"] == "projected" for module in modules),
            "least_retained": min(module["retained"] for module in modules),
            "total_norm": answer.json()["total_norm"],
        }
    assert all(answer.json()["total_norm"] > 0 for answer in reports)


def test_what_the_command_line_serves_is_in_the_audit_log_once(
    cache: ProjectorCache, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each start or API server, but again when its content or the rules are others."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    for policy, folder in (({}, "qv"), ({}, "qv"), ({"select": "all"}, "qv"), ({"select": "all"}, "other")):
        (tmp_path / "gate.sock").unlink(missing_ok=True)
        with Place.start(cache, tmp_path, **policy) as place:
            keys = str(write_keys(place.keys))
            static = {"static": drafts[folder]}
            with place.server(static, keys=keys), place.server(static, keys=keys):
                pass
    found = list(AuditLog(tmp_path / "store" / "audit").read())
    assert [(r["actor"], r["action"], r["adapter"], r["decision"]) for r in found] == [
        ("server", "load", "static", "accepted")
    ] * 3
    assert [r["policy"]["select"] for r in found] == ["threshold", "all", "all"]
