"""Bodies of uploads: how long they may take, who may send them, and what is looked at first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from safelora_vllm.errors import AdapterRefused, Reason, StoreDamaged, UsageError
from safelora_vllm.integration.server import uploads
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.uploads import (
    ARCHIVE,
    Slots,
    TooManyUploads,
    UploadTimeout,
    download,
    patiently,
    receive,
)

BOUNDARY = b"b"


def request(pieces: Iterator[bytes], seconds: float = 0.0) -> Request:
    """A request whose body comes in these pieces, one every so many seconds."""

    async def read() -> dict[str, Any]:
        await asyncio.sleep(seconds)
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    kind = b"multipart/form-data; boundary=" + BOUNDARY
    return Request({"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}, read)


def part(name: str, content: bytes) -> bytes:
    return b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (
        BOUNDARY,
        name.encode(),
        content,
    )


def refuse_others(name: str) -> None:
    if not name.startswith("acme/"):
        raise UsageError(f"{name} is not yours")


def test_the_name_is_looked_at_before_the_files_come(tmp_path: Path) -> None:
    sent = []

    def pieces() -> Iterator[bytes]:
        yield part("name", b"globex/own") + part(ARCHIVE, b"")[:-2]
        for number in range(64):
            sent.append(number)
            yield bytes(1024 * 1024)

    with pytest.raises(UsageError, match="globex/own is not yours"):
        asyncio.run(receive(request(pieces()), tmp_path, 2**30, refuse_others))
    assert len(sent) <= 2


def test_a_body_without_a_name(tmp_path: Path) -> None:
    body = part(ARCHIVE, b"x") + b"--%s--\r\n" % BOUNDARY
    with pytest.raises(UsageError, match="no field 'name'"):
        asyncio.run(receive(request(iter([body])), tmp_path, 2**20, refuse_others))


async def drained(body: Request) -> int:
    return sum([len(piece) async for piece in patiently(body)])


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["nothing", "drip"])
def test_a_body_that_comes_too_slowly(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(UploadTimeout, match="less than 65,536 bytes"):
        asyncio.run(drained(request(iter([piece] * 1000), 0.02)))
    enough = [bytes(64 * 1024)] * 40  # takes longer than that, but keeps coming
    assert asyncio.run(drained(request(iter(enough), 0.02))) == 40 * 64 * 1024


def test_one_tenant_leaves_slots_for_others() -> None:
    slots = Slots(4)
    with slots.take("acme"), slots.take("acme"):
        with pytest.raises(TooManyUploads), slots.take("acme"):
            pass
        with slots.take("globex"), slots.take(None), pytest.raises(TooManyUploads), slots.take(None):
            pass
    with slots.take("acme"), slots.take("acme"):
        pass


@pytest.mark.parametrize(("admin", "shown"), [(True, None), (False, False)])
def test_only_admins_use_the_servers_hub_token(
    admin: bool, shown: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []

    def metadata(_: str, token: object) -> None:
        tokens.append(token)
        raise OSError("no hub here")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    with pytest.raises(UsageError, match="no hub here"):
        download("org/name", None, tmp_path, 2**20, admin)
    assert tokens == [shown]


def test_only_admins_are_told_paths_of_the_server() -> None:
    from safelora_vllm.access import Principal
    from safelora_vllm.integration.server.http_errors import error_response

    error = StoreDamaged("/srv/store/names/x.json is damaged; restore it")
    operator, other = Principal("admin", "k"), Principal("inference", "k")
    for who, told in ((operator, True), (other, False), (None, False)):
        with acting_as(who):
            answer = error_response(error)
        assert answer.status_code == 503
        assert (b"/srv/store" in bytes(answer.body)) is told and b"is damaged" in bytes(answer.body)


def test_a_refusal_answers_with_all_its_reasons() -> None:
    from safelora_vllm.integration.server.http_errors import error_response
    from safelora_vllm.integration.server.schemas import ErrorBody

    found = [Reason("shape", "q has another shape"), Reason("shape", "v too"), Reason("dora", "no")]
    answer = error_response(AdapterRefused(found))
    body = json.loads(bytes(answer.body))
    assert answer.status_code == 422 and "details" not in body["error"]
    assert body["error"]["reasons"] == [
        {"code": "shape", "message": "q has another shape"},
        {"code": "shape", "message": "v too"},
        {"code": "dora", "message": "no"},
    ]
    assert ErrorBody.model_validate(body).error.reasons == found
    reason = ErrorBody.model_json_schema()["$defs"]["Reason"]
    assert list(reason["properties"]) == ["code", "message"]
