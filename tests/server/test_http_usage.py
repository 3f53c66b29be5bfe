"""Who may see what a tenant uses, and who may remove old versions. The engine is a fake one."""

from __future__ import annotations

from pathlib import Path

from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer
from tests.server.test_tenants import KEYS


def test_who_sees_whose_usage(fake: FakeServer, drafts: dict[str, Path]) -> None:
    admin, acme = fake.client(ADMIN_KEY), fake.client(KEYS["acme"])
    assert upload(acme, "acme/x", drafts["qv"]).status_code == 201
    expected = {
        "": (200, 200, 403),
        "acme": (200, 200, 403),
        "globex": (403, 403, 200),
        "none": (403, 403, 403),
    }
    for tenant, (own, named, others) in expected.items():
        query = {"tenant": tenant} if tenant else {}
        assert acme.get("/v1/usage", params=query).status_code == (named if tenant else own), tenant
        if tenant:
            assert fake.client(KEYS["globex"]).get("/v1/usage", params=query).status_code == others, tenant
    for key in (KEYS["inference"], KEYS["wrong"], ""):
        assert fake.client(key).get("/v1/usage").status_code == 401
    for query, words in (
        ({}, "expected ?tenant=NAME"),
        ({"tenant": "none"}, "is not a tenant: the keys file has"),
    ):
        answer = admin.get("/v1/usage", params=query)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    found = admin.get("/v1/usage", params={"tenant": "acme"}).json()
    assert found == acme.get("/v1/usage").json()
    assert found["quota"] == {"max_adapters": 3, "max_bytes": None, "max_rank": 8}
    assert found["adapters"][0]["state"] == "served" and found["policy"]["select"] == "all"
    assert upload(admin, "former/x", drafts["qv"]).status_code == 201, "a tenant that the file has no more"
    former = admin.get("/v1/usage", params={"tenant": "former"}).json()
    assert former["quota"]["max_adapters"] is None and former["used"]["adapters"] == 1


def test_who_removes_old_versions(fake: FakeServer, drafts: dict[str, Path]) -> None:
    admin, acme, globex = (fake.client(KEYS[who]) for who in ("admin", "acme", "globex"))
    for name in ("acme/x", "shared"):
        for draft in ("qv", "other", "qv"):
            assert upload(admin, name, drafts[draft], replace=True).status_code == 201
    for http, path, status in (
        (globex, "acme/x/versions/1", 404), (globex, "nobody/x/versions/1", 404),
        (acme, "shared/versions/1", 403), (acme, "acme/x/versions/9", 400),
        (acme, "acme/x/versions/3", 400), (acme, "acme/x/versions/one", 400),
        (acme, "acme/none/versions/1", 404), (admin, "static/versions/1", 404),
        (fake.client(KEYS["inference"]), "acme/x/versions/1", 401),
        (acme, "acme/x/versions/1", 200), (acme, "acme/x/versions/1", 400), (admin, "shared/versions/2", 200),
    ):  # fmt: skip
        assert http.delete(f"/v1/adapters/{path}").status_code == status, path
    left = acme.get("/v1/adapters/acme/x/versions").json()
    assert (left["current"], [v["version"] for v in left["versions"]]) == (3, [2, 3])
    assert acme.get("/v1/adapters/acme/x").status_code == 200, "it is served as before"
    again = upload(acme, "acme/x", drafts["other"], replace=True)
    assert again.json()["version"] == 4, "numbers are not given again"
