"""Bodies of uploads: how long they may take, who may send them, and what is looked at first."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import AdapterRefused, Reason, StoreDamaged, StoreUnavailable, UsageError
from safelora_vllm.integration.server import uploads
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.uploads import (
    ARCHIVE,
    Received,
    TooLarge,
    TooManyUploads,
    UploadLimiter,
    UploadTimeout,
    _Form,
    download,
    incoming,
    read_with_timeout,
    receive,
)

BOUNDARY = b"b"
KIND = b"multipart/form-data; boundary=" + BOUNDARY


def request(pieces: Iterator[bytes], seconds: float = 0.0, kind: bytes = KIND) -> Request:
    """A request whose body comes in these pieces, one every so many seconds."""

    async def read() -> dict[str, Any]:
        await asyncio.sleep(seconds)
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

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


END = b"--%s--\r\n" % BOUNDARY
NAME, FILE = part("name", b"acme/x"), part(ARCHIVE, b"content")
BOTH = part(CONFIG, b"{}") + part(WEIGHTS, b"w")


def received(folder: Path, body: bytes, max_bytes: int = 2**20) -> Received:
    """What comes of a whole body."""
    return asyncio.run(receive(request(iter([body])), folder, max_bytes, refuse_others))


def test_what_a_whole_body_holds(tmp_path: Path) -> None:
    fields = part("hub_id", b"org/x") + part("revision", b"main")
    for number, (files, adapter) in enumerate({FILE: ARCHIVE, BOTH: "."}.items()):
        (folder := tmp_path / str(number)).mkdir()
        found = received(folder, NAME + files + fields + END)
        assert found.fields == {"name": "acme/x", "hub_id": "org/x", "revision": "main"}
        assert found.adapter == folder / adapter
    assert (tmp_path / "0" / ARCHIVE).read_bytes() == b"content"
    assert (tmp_path / "1" / CONFIG).read_bytes() == b"{}"
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == b"w"


@pytest.mark.parametrize(
    "files",
    [b"", FILE + part(CONFIG, b"{}"), part(CONFIG, b"{}"), FILE + BOTH],
    ids=["none", "archive and one", "one", "archive and both"],
)
def test_a_body_has_both_files_or_one_archive(files: bytes, tmp_path: Path) -> None:
    found = received(tmp_path, NAME + files + END)
    with pytest.raises(UsageError, match=f"send {CONFIG} and {WEIGHTS}, or one {ARCHIVE}"):
        _ = found.adapter


@pytest.mark.parametrize("files", [FILE, BOTH], ids=["archive", "files"])
@pytest.mark.parametrize("cut", [len(END), len(END) - 1, 4, 3], ids=str)
def test_a_body_that_is_whole_but_for_its_closing_boundary(cut: int, files: bytes, tmp_path: Path) -> None:
    """Its last file may be cut too, which nothing else tells: an archive has no length of its own."""
    body = NAME + files + END
    with pytest.raises(UsageError, match="ends before its closing boundary"):
        received(tmp_path, body[:-cut])


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("name", ["name", "hub_id", ARCHIVE, CONFIG, WEIGHTS])
def test_a_part_that_is_there_twice(name: str, place: str, tmp_path: Path) -> None:
    """Readers differ in which of two they take."""
    parts = {"name": NAME, "hub_id": part("hub_id", b"o/x"), ARCHIVE: FILE, CONFIG: part(CONFIG, b"{}")}
    others = b"".join(one for other, one in parts.items() if other != name)
    first, second = part(name, b"acme/1"), part(name, b"acme/2")
    body = first + (others + second if place == "behind" else second + others)
    with pytest.raises(UsageError, match=f"{name} is there twice"):
        received(tmp_path, body + END)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("name", 300), ("hub_id", 300), ("revision", 200), (ARCHIVE, 5000), (WEIGHTS, 5000),
        (CONFIG, 1024**2),
    ],
)  # fmt: skip
def test_a_part_is_as_long_as_allowed_and_not_one_byte_longer(name: str, most: int, tmp_path: Path) -> None:
    def body(size: int) -> bytes:
        return (NAME if name != "name" else b"") + part(name, b"acme/".ljust(size, b"x")) + END

    found = received(tmp_path, body(most), 5000)
    assert most == (len(found.fields[name]) if name in found.fields else (tmp_path / name).stat().st_size)
    (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(TooLarge, match=f"{name} is larger than the {most:,} bytes"):
        received(tmp_path, body(most + 1), 5000)


def test_nothing_of_a_part_that_is_too_long_is_kept_beyond_its_bound(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield NAME + part(ARCHIVE, b"")[:-2]
        while True:
            yield bytes(64 * 1024)

    with pytest.raises(TooLarge, match=f"{ARCHIVE} is larger than"):
        asyncio.run(receive(request(pieces()), tmp_path, 5000, refuse_others))
    assert (tmp_path / ARCHIVE).stat().st_size <= 5000


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_body_ends_at_its_bound_also_where_no_part_grows(where: str, tmp_path: Path) -> None:
    """Line ends before the first boundary and anything behind the last are skipped, however many they are."""
    sound, most = NAME + FILE + END, 5000 + 3 * 1024**2

    def pieces(size: int) -> Iterator[bytes]:
        nonlocal sent
        filling = size - len(sound)
        if where == "behind":
            yield sound
        while filling > 0:
            sent += (piece := min(filling, 64 * 1024))
            filling -= piece
            yield b"\r\n" * (piece // 2) + b"\n" * (piece % 2)
        if where == "before":
            yield sound

    for size, fits in ((most, True), (most + 1, False), (10 * most, False)):
        sent = 0
        (folder := tmp_path / str(size)).mkdir()
        if fits:
            upload = asyncio.run(receive(request(pieces(size)), folder, 5000, refuse_others))
            assert (upload.adapter).read_bytes() == b"content"
            continue
        with pytest.raises(TooLarge, match="the body is larger than the 5,000 bytes"):
            asyncio.run(receive(request(pieces(size)), folder, 5000, refuse_others))
        assert sent <= most + 64 * 1024


def test_headers_of_a_part_without_end(tmp_path: Path) -> None:
    """Newer versions of python-multipart have a bound of their own."""
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield b"--%s\r\n" % BOUNDARY
        while True:
            sent += len(piece := b"X-Header: value\r\n" * 4000)
            yield piece

    with pytest.raises((TooLarge, UsageError), match=r"the body is larger|cannot be read"):
        asyncio.run(receive(request(pieces()), tmp_path, 5000, refuse_others))
    assert sent < 5000 + 3 * 1024**2


@pytest.mark.parametrize("side", ["on_header_field", "on_header_value"])
def test_one_header_without_end(side: str, tmp_path: Path) -> None:
    """As older versions of python-multipart hand it on, piece by piece."""
    taken = _Form(tmp_path, 5000, refuse_others).callbacks()[side]
    for _ in range(16):
        taken(b"x" * 4096, 0, 4096)
    with pytest.raises(ValueError, match="header is too long"):
        taken(b"x", 0, 1)


@pytest.mark.parametrize(
    "kind",
    [
        b"", b"application/json", b"text/plain; boundary=b", b"multipart/mixed; boundary=b",
        b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; border=b",
    ],
    ids=repr,
)  # fmt: skip
def test_a_body_of_another_type(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not multipart/form-data with a boundary"):
        asyncio.run(receive(request(iter([NAME + FILE + END]), kind=kind), tmp_path, 5000, refuse_others))


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense", part("other", b"x") + END, part("", b"x") + END, NAME + b"--b\r\n\r\nx\r\n" + END,
        part("name", b"acme/\xff") + END, part("hub_id", b"\xff") + NAME + END,
        NAME + part("x", b"").replace(b'"x"', b'"\xff"') + END,
    ],
    ids=repr,
)  # fmt: skip
def test_a_body_that_cannot_be_read(body: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the multipart body cannot be read"):
        received(tmp_path, body)


def test_a_client_that_goes_away(tmp_path: Path) -> None:
    messages = iter([{"type": "http.request", "body": NAME, "more_body": True}, {"type": "http.disconnect"}])

    async def read() -> dict[str, Any]:
        return next(messages)

    gone = Request({"type": "http", "method": "POST", "headers": [(b"content-type", KIND)]}, read)
    with pytest.raises(UsageError, match="the client went away"):
        asyncio.run(receive(gone, tmp_path, 5000, refuse_others))


def test_a_store_that_cannot_be_written_is_not_the_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="the adapter store cannot be written"):
        received(tmp_path / "none", NAME + FILE + END)
    (tmp_path / "file").touch()

    async def enter() -> None:
        async with incoming(tmp_path / "file"):
            pytest.fail("there is no such folder")

    with pytest.raises(StoreUnavailable, match="the adapter store cannot be written"):
        asyncio.run(enter())


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_received_is_gone_in_the_end_and_private_before(fails: bool, tmp_path: Path) -> None:
    async def use() -> list[int]:
        async with incoming(tmp_path / "store") as one, incoming(tmp_path / "store") as other:
            assert one != other and one.parent == other.parent == tmp_path / "store" / "incoming"
            (one / "sub").mkdir()
            (one / "sub" / ARCHIVE).touch()
            modes.extend(path.stat().st_mode & 0o777 for path in (one, other, one.parent))
            if fails:
                raise UsageError("refused")
        return modes

    modes: list[int] = []
    with pytest.raises(UsageError, match="refused") if fails else contextlib.nullcontext():
        asyncio.run(use())
    assert modes == [0o700] * 3
    assert list((tmp_path / "store" / "incoming").iterdir()) == []


def test_a_body_without_a_name(tmp_path: Path) -> None:
    body = part(ARCHIVE, b"x") + b"--%s--\r\n" % BOUNDARY
    with pytest.raises(UsageError, match="no field 'name'"):
        asyncio.run(receive(request(iter([body])), tmp_path, 2**20, refuse_others))


async def drained(body: Request) -> int:
    return sum([len(piece) async for piece in read_with_timeout(body)])


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["nothing", "drip"])
def test_a_body_that_comes_too_slowly(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(UploadTimeout, match="less than 65,536 bytes"):
        asyncio.run(drained(request(iter([piece] * 1000), 0.02)))
    beginning = [bytes(64 * 1024)]  # earns it one more such time, not all that follow
    with pytest.raises(UploadTimeout):
        asyncio.run(drained(request(iter(beginning + [piece] * 1000), 0.02)))
    # Takes longer than the time for one piece, but keeps coming; a busy machine may stall it a little.
    monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 1.0)
    assert asyncio.run(drained(request(iter([bytes(64 * 1024)] * 20), 0.06))) == 20 * 64 * 1024


def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However well it keeps coming: a key that is taken out has to be out at some time."""
    monkeypatch.setattr(uploads, "_MOST_SECONDS", 0.3)
    with pytest.raises(UploadTimeout, match="the body did not end in"):
        asyncio.run(drained(request(iter([bytes(64 * 1024)] * 1000), 0.02)))


def test_one_tenant_leaves_slots_for_others() -> None:
    slots = UploadLimiter(4)
    with slots.take("acme"), slots.take("acme"):
        with pytest.raises(TooManyUploads), slots.take("acme"):
            pass
        with slots.take("globex"), slots.take(None), pytest.raises(TooManyUploads), slots.take(None):
            pass
        with slots.take("globex"):
            with pytest.raises(TooManyUploads), slots.take("globex"):
                pass  # all tenants together leave one to the operator
            with slots.take(None):
                pass
    with slots.take("acme"), slots.take("acme"):
        pass


def test_of_an_odd_number_of_slots_others_have_the_one_more() -> None:
    slots = UploadLimiter(5)
    with slots.take("acme"), slots.take("acme"), pytest.raises(TooManyUploads), slots.take("acme"):
        pass


def test_where_there_is_one_slot_a_tenant_may_have_it() -> None:
    with UploadLimiter(1).take("acme"):
        pass
    with pytest.raises(TooManyUploads), UploadLimiter(0).take("acme"):
        pass


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({CONFIG: 1024**2, WEIGHTS: 5000}, ""),
        (
            {CONFIG: 1024**2 + 1, WEIGHTS: 1},
            f"{CONFIG} of org/name has 1,048,577 bytes; this server accepts 1,048,576",
        ),
        ({CONFIG: 1, WEIGHTS: 5001}, f"{WEIGHTS} of org/name has 5,001 bytes; this server accepts 5,000"),
        ({CONFIG: 1, WEIGHTS: 10**12}, f"{WEIGHTS} of org/name has 1,000,000,000,000 bytes"),
    ],
)
def test_the_hub_says_how_large_a_file_is_before_it_is_downloaded(
    sizes: dict[str, int], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[tuple[str, str, Path]] = []

    def metadata(url: str, token: object) -> SimpleNamespace:
        assert token is False and "/org/name/resolve/v1/" in url
        return SimpleNamespace(size=sizes[url.rpartition("/")[2]], commit_hash=None)

    def fetch(hub_id: str, name: str, revision: str, local_dir: Path, token: object) -> None:
        assert (hub_id, revision, token) == ("org/name", "v1", False)
        downloaded.append((name, revision, local_dir))

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    if told:
        with pytest.raises(TooLarge, match=told):
            download("org/name", "v1", tmp_path, 5000, False)
        assert not {name for name, *_ in downloaded if told.startswith(name)}
    else:
        assert download("org/name", "v1", tmp_path, 5000, False) == tmp_path
        assert downloaded == [(name, "v1", tmp_path) for name in (CONFIG, WEIGHTS)]


def test_a_branch_of_the_hub_that_moves_is_read_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the size that was looked at is not that of the file which comes."""
    commits, asked = iter("abcd"), list[str]()

    def metadata(url: str, **_: object) -> SimpleNamespace:
        revision = url.split("/resolve/")[1].partition("/")[0]
        asked.append(revision)
        return SimpleNamespace(size=1, commit_hash=next(commits) if revision == "main" else revision)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda _, name, revision, **__: asked.append(f"{name} {revision}")
    )
    download("org/name", None, tmp_path, 5000, False)
    assert asked == ["main", f"{CONFIG} a", "a", f"{WEIGHTS} a"]


@pytest.mark.parametrize(
    "hub_id", ["", "name", "org/", "/name", "a/b/c", "../name", "org/..", "org/n?x", "org/name@v1", "o/n\n"]
)
def test_what_is_no_hub_id_is_not_asked_for(
    hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *_args, **_more: pytest.fail("asked"))
    with pytest.raises(UsageError, match="is not a valid hub id: expected ORGANISATION/NAME"):
        download(hub_id, None, tmp_path, 5000, False)


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
    from safelora_vllm.integration.server.http_errors import error_response
    from safelora_vllm.tenants.principal import Principal

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
