"""What tenants are told of an adapter's figures, where the operator keeps those of single modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelora_vllm.projectors.cache import ProjectorCache
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
    own = 14 if told == "full" else 0
    assert counts == [own, 14, own, own, own, own, 14]
    assert all(answer.json()["total_norm"] > 0 for answer in reports)
