"""An admin has an adapter served that failed its exam: who may, for what it holds, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.server.test_exam_again import examine_again, until
from tests.server.test_exam_server import (  # noqa: F401
    Start,
    adapters,
    answer_of,
    answer_of_lookup,
    digest_of,
    place,
    start,
)

WHY = "measured on our tasks"


def override(server: FakeServer, name: str, wanted: bool, key: str = ADMIN_KEY, reason: str = WHY) -> Any:
    body = {"override": wanted, "reason": reason}
    return server.client(key).put(f"/v1/adapters/{name}/exam", json=body)


def upload_anyway(http: Any, name: str, folder: Path, reason: str = WHY, **more: str) -> Any:
    body = {"name": name, "path": str(folder)}
    return http.post("/v1/adapters", params={"exam_override": reason, **more}, json=body)


def is_whole(file: Path, content: bytes) -> bool:
    """Between two copies there is none for a moment."""
    try:
        return file.read_bytes() == content
    except FileNotFoundError:
        return False


def test_a_failed_adapter_is_served_by_an_override(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    roots = {"adapter_roots": [str(adapters["harmful"].parent)]}
    with start(**roots) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "bad", adapters["harmful"]).status_code == 422
        assert upload_anyway(http, "bad", adapters["harmful"], " ").status_code == 400
        made = upload_anyway(http, "bad", adapters["harmful"])
        assert made.status_code == 201, made.text
        assert (made.json()["exam_override"], made.json()["reason"]) == (True, WHY)
        assert made.json()["policy"]["threshold"] == 0.35, "the server's, as without an exam"
        (listed,) = http.get("/v1/adapters").json()["data"]
        assert listed["exam_override"] and listed["override"] is False
        # It is examined all the same, and nothing follows from that.
        until(server, lambda: http.get("/v1/adapters/bad").json()["exam"] is not None)
        assert http.get("/v1/adapters/bad").json()["exam"]["passed"] is False
        again = examine_again(server, "bad").json()
        assert (again["passed"], again["withdrawn"]) == (False, False)
        assert answer_of(server, "bad") == 200
    with start(**roots) as server:  # after a restart, at once
        assert answer_of_lookup(server, "bad") == 200
        # A copy that was damaged is made again.
        (key,) = {file.parent.name for file in place.store.glob(f"published/*/{WEIGHTS}")} & {
            server.app.state.safelora.registry["bad"].version.key
        }
        weights = place.store / "published" / key / WEIGHTS
        whole = weights.read_bytes()
        weights.write_bytes(b"damaged")
        until(server, lambda: is_whole(weights, whole))
        assert answer_of(server, "bad") == 200
        # It is of this content: another one has to pass, and the same one too when it comes back.
        http = server.client(ADMIN_KEY)
        assert upload(http, "bad", adapters["useful"], replace=True).status_code == 201
        assert http.get("/v1/adapters/bad").json()["exam_override"] is False
        assert upload(http, "bad", adapters["harmful"], replace=True).status_code == 422
        versions = http.get("/v1/adapters/bad/versions").json()["versions"]
        assert [version["exam_override"] for version in versions] == [True, False]
        back = http.post("/v1/adapters/bad/rollback", json={"version": 1})  # an admin's, as with policies
        assert back.status_code == 200 and back.json()["exam_override"]
        strict = http.put("/v1/adapters/bad/policy", json={"policy": {"threshold": 0.9}})
        assert strict.status_code == 200 and strict.json()["exam_override"], "it is of the content"
        assert override(server, "bad", False).status_code == 422
        assert answer_of(server, "bad") == 422
        assert override(server, "bad", False).status_code == 400, "there is none any more"
    with start() as server:
        assert answer_of(server, "bad") == 422
        # What the store has and the exam refuses can be overridden where it is.
        assert override(server, "bad", True, reason="").status_code == 400
        assert override(server, "bad", True).status_code == 200 and answer_of(server, "bad") == 200
    lines = [line for line in AuditLog(place.store / "audit").read() if line["action"] == "exam"]
    told = [
        (line["actor"], line["decision"], line.get("exam_override"), line.get("reason")) for line in lines
    ]
    assert [line for line in told if line[2] is not None] == [
        ("admin/environment", "accepted", False, WHY), ("admin/environment", "accepted", True, WHY),
    ]  # fmt: skip
    (first,) = [line for line in AuditLog(place.store / "audit").read() if line["action"] == "upload"][1:2]
    assert (first["exam_override"], first["reason"]) == (True, WHY)


def test_what_passes_climbs_when_the_override_ends(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start() as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "careless", adapters["careless"]).json()["policy"]["select"] == "all"
        assert override(server, "careless", True).json()["policy"]["select"] == "threshold"
        back = override(server, "careless", False)
        assert back.status_code == 200 and back.json()["policy"]["select"] == "all"
        assert back.json()["exam_override"] is False and answer_of(server, "careless") == 200


def test_no_tenant_can_set_it(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    place.tenant()
    roots = {"adapter_roots": [str(adapters["harmful"].parent)]}
    with start(keys=str(place.keys), **roots) as server:
        acme, admin = server.client(SECRET), server.client(ADMIN_KEY)
        files = {name: (adapters["harmful"] / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)}
        answer = acme.post(
            "/v1/adapters", params={"exam_override": WHY}, data={"name": "acme/x"}, files=files
        )
        assert answer.status_code == 403, answer.text
        assert override(server, "acme/x", True, SECRET).status_code == 403
        assert upload(acme, "acme/x", adapters["useful"]).status_code == 201
        assert override(server, "acme/x", True, SECRET).status_code == 403
        assert upload_anyway(admin, "acme/x", adapters["harmful"], replace="true").status_code == 201
        assert answer_of(server, "acme/x") == 200
        # A tenant's own calls lose it, or change nothing.
        assert upload(acme, "acme/x", adapters["harmful"], replace=True).status_code == 422
        assert upload(acme, "acme/y", adapters["harmful"]).status_code == 422
        assert upload(acme, "acme/x", adapters["useful"], replace=True).status_code == 201
        assert acme.post("/v1/adapters/acme/x/rollback", json={"version": 2}).status_code == 422
        shown = admin.get("/v1/adapters/acme/x").json()
        assert shown["digest"] == digest_of(adapters["useful"]) and not shown["exam_override"]
    with start(keys=str(place.keys), exam="report", ladder=None) as server:
        assert override(server, "acme/x", True).status_code == 400, "nothing is enforced"
