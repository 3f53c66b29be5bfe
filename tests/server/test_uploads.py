"""Uploads on a live server: what a fake engine cannot show. The rest is in `test_http_uploads`."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
from server import Server

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, client, first_token, metric_samples, say, upload


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


def test_a_hot_swap_is_answered_by_the_new_version(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    """Also where a whole block of the prompt is in the prefix cache, as the old version computed it."""
    prompt = "The capital of France is Paris, and " * 40  # blocks have 128 tokens
    upload(admin, "swap", adapters["qv"])
    said, old = first_token(user, "swap"), first_token(user, "swap", prompt)
    first_token(user, "swap", prompt)
    hits = prefix_cache_hits(user)
    assert hits >= 128, "the second time, the first block came from the cache"
    assert upload(admin, "swap", adapters["other"], replace=True).status_code == 201
    new = first_token(user, "swap", prompt)
    assert upload(admin, "fresh", adapters["other"]).status_code == 201  # never asked before
    assert new == first_token(user, "fresh", prompt) != old
    assert prefix_cache_hits(user) == hits
    assert admin.post("/v1/adapters/swap/rollback", json={"version": 1}).status_code == 200
    assert first_token(user, "swap") == said


def prefix_cache_hits(user: httpx.Client) -> float:
    """Tokens that were found in it, of all requests."""
    samples = metric_samples(user).items()
    return sum(value for (name, _), value in samples if name == "vllm:prefix_cache_hits_total")


def test_long_json_bodies_are_not_read(server: Server, admin: httpx.Client) -> None:
    """FastAPI reads a body before it looks for a key."""
    with httpx.Client(base_url=server.url) as nobody:
        for http in (admin, nobody):
            for route in ("/v1/load_lora_adapter", "/v1/adapters/x/rollback"):
                assert http.post(route, content=b" " * 70_000).status_code in (401, 413)
                chunks = (b" " * 10_000 for _ in range(100))
                kind = {"Content-Type": "multipart/form-data; boundary=b"}
                assert http.post(route, content=chunks, headers=kind).status_code in (400, 401, 413)


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


def test_neither_log_has_secrets(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], store: Path
) -> None:
    upload(admin, "noted", adapters["qv"])
    admin.delete("/v1/adapters/noted")
    text = (store / "audit" / "audit.jsonl").read_text()
    actions = [e["action"] for e in AuditLog(store / "audit").read(None, None) if e["adapter"] == "noted"]
    assert actions == ["upload", "delete"]
    for secret in (ADMIN_KEY, *TENANT_KEYS.values()):
        assert secret not in text and secret not in server.log.read_text()
