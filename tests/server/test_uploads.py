"""Uploading, replacing, rolling back, re-judging and removing adapters on a live server."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import httpx
import pytest
from server import Server

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import NameStore
from safelora_vllm.store.audit_log import AuditLog
from tests.corpus.target import Target, sound
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, client, metric_samples, say, upload, write_adapter
from tests.tiny import Q0


def archive(folder: Path, kind: str) -> bytes:
    """The folder as one archive, its files in a folder of their own."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as file:
            for name in (CONFIG, WEIGHTS):
                file.write(folder / name, f"adapter/{name}")
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(folder, "adapter")
    return packed.getvalue()


def test_upload_and_use(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    answer = upload(admin, "fresh", adapters["qv"])
    assert answer.status_code == 201, answer.text
    report = answer.json()
    assert report["adapter"] == "fresh" and report["version"] == 1 and len(report["modules"]) == 60
    assert say(user, "fresh")
    assert user.get("/v1/adapters/fresh").json() == report
    assert list((store / "incoming").iterdir()) == []
    assert (store / "raw" / report["digest"] / WEIGHTS).is_file()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_are_the_same_adapter(admin: httpx.Client, adapters: dict[str, Path], kind: str) -> None:
    digest = upload(admin, "files", adapters["qv"]).json()["digest"]
    packed = {"archive": archive(adapters["qv"], kind)}
    answer = admin.post("/v1/adapters", data={"name": "packed"}, files=packed)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == digest


def test_upload_by_path(admin: httpx.Client, adapters: dict[str, Path]) -> None:
    answer = admin.post("/v1/adapters", json={"name": "by-path", "path": str(adapters["qv"])})
    assert answer.status_code == 201, answer.text


def test_bad_bodies(admin: httpx.Client, adapters: dict[str, Path]) -> None:
    both = {file: (adapters["qv"] / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    for data, files in (
        ({}, both),
        ({"name": "x"}, {CONFIG: both[CONFIG]}),
        ({"name": "x"}, {**both, "archive": b"PK"}),
        ({"name": "x"}, {**both, "other": b"1"}),
        ({"name": "x" * 400}, both),
        ({"name": "a/b/c"}, both),
    ):
        answer = admin.post("/v1/adapters", data=data, files=files)
        assert answer.status_code == 400 or answer.status_code == 413, (answer.status_code, answer.text)
        assert answer.json()["error"]["message"]
    hub = admin.post("/v1/adapters", files={"name": (None, "x"), "hub_id": (None, "org/adapter")})
    assert hub.status_code == 403
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in {"name": b"x", **both}.items()
    )
    for body, told in (
        (b"", "closing boundary"),
        (b"nonsense", "cannot be read"),
        (parts, "closing boundary"),
    ):
        cut = admin.post("/v1/adapters", content=body, headers=header)
        assert cut.status_code == 400 and told in cut.json()["error"]["message"], cut.text
    assert admin.post("/v1/adapters", content=b"x").status_code == 400
    assert admin.post("/v1/adapters", json={"name": "x"}).status_code in (400, 422)
    assert admin.get("/v1/adapters/x").status_code == 404


def test_too_large_is_413(admin: httpx.Client) -> None:
    files = {CONFIG: b"{}", WEIGHTS: bytes(41_000_000)}
    answer = admin.post("/v1/adapters", data={"name": "big"}, files=files)
    assert answer.status_code == 413
    assert "40,000,000" in answer.json()["error"]["message"]


def test_too_many_at_once_are_429(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    """Eight clients that send slowly hold all places; the ninth is told when to come back."""
    release, waiting = threading.Event(), []

    def slowly() -> None:
        def body():  # type: ignore[no-untyped-def]
            yield b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
            release.wait(60)

        header = {"Content-Type": "multipart/form-data; boundary=x"}
        with client(server, ADMIN_KEY) as http:
            waiting.append(http.post("/v1/adapters", content=body(), headers=header).status_code)

    threads = [threading.Thread(target=slowly, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 30
        while len(list((store / "incoming").glob("*"))) < 8:
            assert time.monotonic() < deadline, "eight uploads have begun"
            time.sleep(0.1)
        answer = upload(admin, "ninth", adapters["qv"], replace=True)
        assert answer.status_code == 429 and answer.headers["Retry-After"]
    finally:
        release.set()
        for thread in threads:
            thread.join()
    assert waiting == [400] * 8
    assert upload(admin, "ninth", adapters["qv"], replace=True).status_code == 201


def test_refusals_give_every_reason(admin: httpx.Client, target: Target, tmp_path: Path) -> None:
    draft = sound(target)
    draft.move(Q0, "model.layers.9999.self_attn.q_proj")
    draft.config.update(use_dora=True, lora_alpha="lots")
    answer = upload(admin, "bad", draft.write(tmp_path / "bad"))
    assert answer.status_code == 422
    assert {"dora", "config_type", "no_projector"} <= {
        reason["code"] for reason in answer.json()["error"]["reasons"]
    }
    assert admin.get("/v1/adapters/bad").status_code == 404


def test_versions_and_rollback(admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]) -> None:
    first = upload(admin, "swap", adapters["qv"]).json()
    said = say(user, "swap")
    assert upload(admin, "swap", adapters["other"]).status_code == 409
    second = upload(admin, "swap", adapters["other"], replace=True).json()
    assert (second["version"], second["digest"] != first["digest"]) == (2, True)
    back = admin.post("/v1/adapters/swap/rollback", json={"version": 1})
    assert back.status_code == 200 and back.json()["digest"] == first["digest"]
    assert say(user, "swap") == said
    listed = user.get("/v1/adapters/swap/versions").json()
    assert listed["current"] == 3
    digests = [version["digest"] for version in listed["versions"]]
    assert digests == [first["digest"], second["digest"], first["digest"]]
    assert admin.post("/v1/adapters/swap/rollback", json={"version": 9}).status_code == 400
    assert admin.post("/v1/adapters/nobody/rollback", json={"version": 1}).status_code == 404


def test_policy_of_one_adapter(admin: httpx.Client, adapters: dict[str, Path], store: Path) -> None:
    upload(admin, "judged", adapters["qv"])

    def put(**body: object) -> httpx.Response:
        return admin.put("/v1/adapters/judged/policy", json=body)

    strict = put(policy={"max_relative_norm": 0.5})
    assert strict.status_code == 200, strict.text
    assert strict.json()["policy"]["max_relative_norm"] == 0.5 and not strict.json()["override"]
    assert put(policy={"max_relative_norm": 0.01}).status_code == 422
    assert admin.get("/v1/adapters/judged").json()["policy"]["max_relative_norm"] == 0.5
    assert put(policy={"select": "number", "number": 3}).status_code == 400
    assert put(policy={"select": "number", "number": 3}, override=True).status_code == 400
    assert put(policy={"nonsense": 1}).status_code == 400
    loose = put(policy={"select": "number", "number": 3}, override=True, reason="a trusted author")
    assert loose.status_code == 200
    assert sum(m["decision"] == "projected" for m in loose.json()["modules"]) == 3
    assert (loose.json()["override"], loose.json()["reason"]) == (True, "a trusted author")
    overridden = NameStore(store).get("judged").live.policy
    assert overridden["number"] == 3 and "max_total_norm" not in overridden, "caps that were not named"
    replaced = upload(admin, "judged", adapters["other"], replace=True).json()
    assert {m["decision"] for m in replaced["modules"]} == {"projected"}, "an override is for its content"
    assert replaced["policy"]["max_relative_norm"] == 0.5, "and leaves what holds for the name"
    put(policy={"max_relative_norm": 0.5})
    replaced = upload(admin, "judged", adapters["qv"], replace=True).json()
    assert replaced["policy"]["max_relative_norm"] == 0.5, "a stricter policy is for the name"
    entries = [e for e in AuditLog(store / "audit").read(None, None) if e["adapter"] == "judged"]
    assert [e["action"] for e in entries if e["action"] == "policy"]
    assert any(e.get("reason") == "a trusted author" and e["override"] for e in entries)
    assert any(e["decision"] == "refused" and e["reasons"] == ["relative_norm"] for e in entries)


def test_a_tenant_does_not_bring_a_revoked_override_back(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    upload(admin, "acme/own", adapters["qv"])
    put, route = admin.put, "/v1/adapters/acme/own/policy"
    lax = {"policy": {"mode": "report-only"}, "override": True, "reason": "a test of ours"}
    assert put(route, json=lax).json()["policy"]["mode"] == "report-only"
    assert put(route, json={"policy": {}}).json()["policy"]["mode"] == "enforce"
    with client(server, TENANT_KEYS["acme"]) as acme:
        back = acme.post("/v1/adapters/acme/own/rollback", json={"version": 2})
        assert back.status_code == 200
        assert back.json()["policy"]["mode"] == "enforce" and not back.json()["override"]
    # The gate enforces without an override, whatever is stored: a laxer server would take it from there.
    live = NameStore(store).get("acme/own").live
    assert (live.version, live.policy, live.override) == (4, {}, False)
    back = admin.post("/v1/adapters/acme/own/rollback", json={"version": 2})
    assert back.json()["policy"]["mode"] == "report-only" and back.json()["override"]
    live = NameStore(store).get("acme/own").live
    assert live.policy["mode"] == "report-only" and live.override


def test_long_json_bodies_are_not_read(server: Server, admin: httpx.Client) -> None:
    """FastAPI reads a body before it looks for a key."""
    with httpx.Client(base_url=server.url) as nobody:
        for http in (admin, nobody):
            for route in ("/v1/load_lora_adapter", "/v1/adapters/x/rollback"):
                assert http.post(route, content=b" " * 70_000).status_code in (401, 413)
                chunks = (b" " * 10_000 for _ in range(100))
                kind = {"Content-Type": "multipart/form-data; boundary=b"}
                assert http.post(route, content=chunks, headers=kind).status_code in (400, 401, 413)


def test_delete_frees_everything(admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]) -> None:
    upload(admin, "gone", adapters["qv"])
    answer = admin.delete("/v1/adapters/gone")
    assert answer.json() == {"id": "gone", "object": "adapter", "deleted": True}
    assert "gone" not in user.get("/v1/models").text
    assert user.post("/v1/completions", json={"model": "gone", "prompt": "x"}).status_code == 404
    assert not any(("adapter", "gone") in labels for _, labels in metric_samples(user))
    assert admin.delete("/v1/adapters/gone").status_code == 404
    assert admin.delete("/v1/adapters/static").status_code == 400


def test_requests_in_flight_end_on_the_old_weights(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    """A stream that began before a replacement and a removal says what it says undisturbed."""
    upload(admin, "swap", adapters["qv"])
    body = {"model": "swap", "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0}
    body |= {"ignore_eos": True}
    undisturbed = user.post("/v1/completions", json=body).json()["choices"][0]["text"]
    text = ""
    with user.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        for number, line in enumerate(line for line in stream.iter_lines() if line.startswith("data: {")):
            text += json.loads(line[6:])["choices"][0]["text"]
            if number == 5:
                assert upload(admin, "swap", adapters["other"], replace=True).status_code == 201
            if number == 10:
                assert admin.delete("/v1/adapters/swap").status_code == 200
    assert text == undisturbed


@pytest.mark.usefixtures("admin")  # cleans up
def test_tenant_quota(server: Server, projectors: Path, store: Path, tmp_path: Path) -> None:
    cache = ProjectorCache(projectors)
    for seed in range(4):
        write_adapter(tmp_path / str(seed), cache, ("q_proj",), 4, seed=100 + seed)
    write_adapter(tmp_path / "rank", cache, ("q_proj",), 16, seed=200)
    with client(server, TENANT_KEYS["acme"]) as acme:
        over = upload(acme, "acme/rank", tmp_path / "rank")
        assert over.status_code == 403 and "max_rank" in over.json()["error"]["message"]
        *_, entry = AuditLog(store / "audit").read(None, None)
        assert (entry["adapter"], entry["reasons"]) == ("acme/rank", ["quota"])
        for seed in range(3):
            assert upload(acme, f"acme/{seed}", tmp_path / str(seed)).status_code == 201
        over = upload(acme, "acme/3", tmp_path / "3")
        assert over.status_code == 403 and "max_adapters" in over.json()["error"]["message"]
        *_, entry = AuditLog(store / "audit").read(None, None)
        assert (entry["adapter"], entry["decision"], entry["reasons"]) == ("acme/3", "refused", ["quota"])
        assert upload(acme, "acme/2", tmp_path / "3", replace=True).status_code == 201
        assert acme.delete("/v1/adapters/acme/0").status_code == 200
        assert upload(acme, "acme/3", tmp_path / "3").status_code == 201


def test_audit_log_has_no_secrets(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    upload(admin, "noted", adapters["qv"])
    admin.delete("/v1/adapters/noted")
    text = (store / "audit" / "audit.jsonl").read_text()
    actions = [e["action"] for e in AuditLog(store / "audit").read(None, None) if e["adapter"] == "noted"]
    assert actions == ["upload", "delete"]
    for secret in (ADMIN_KEY, *TENANT_KEYS.values()):
        assert secret not in text and secret not in server.log.read_text()
