"""Uploads that name a remote source, over HTTP: who may read what, S3 on the loopback, hostile archives."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("obstore", reason="signs the URLs")
import s3_upload

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.remote import clouds
from tests.moto_server import CREDENTIALS, s3
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, MAX_BYTES
from tests.server.fake_server import FakeServer, Place
from tests.tiny import Draft, lora

SECRETS = {name: f"the long secret of {name}" for name in ("acme", "globex")}
KEYS = "".join(
    f'[tenants.{name}]\nremote_sources = ["s3://bucket/{name}/"]\n[tenants.{name}.keys]\nci = "{secret}"\n'
    for name, secret in SECRETS.items()
)


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[str, Any]]:
    with s3() as found:
        yield found


@pytest.fixture
def place(
    storage: tuple[str, Any], cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    for name, value in {
        **CREDENTIALS, "AWS_ENDPOINT_URL": storage[0], "VLLM_PLUGINS": "safelora",
        "SAFELORA_ADMIN_API_KEY": ADMIN_KEY,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    clouds._store.cache_clear()
    with Place.start(cache, tmp_path, select="all") as place:
        place.keys.touch(0o600)
        place.keys.write_text(KEYS)
        yield place
    clouds._store.cache_clear()


@pytest.fixture
def api(place: Place, storage: tuple[str, Any]) -> Iterator[FakeServer]:
    given = {"keys": str(place.keys), "max_adapter_bytes": MAX_BYTES, "remote_endpoints": [storage[0]]}
    with place.server({}, INFERENCE_KEY, **given, remote_sources=["s3://bucket/shared"]) as started:
        yield started


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = Draft(tensors=lora(seed=1)).write(tmp_path / "adapter")
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def put(storage: tuple[str, Any], folder: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        storage[1].put_object(Bucket="bucket", Key=f"{folder}/{name}", Body=content)
    return f"s3://bucket/{folder}"


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"adapter/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def add(http: httpx.Client, name: str, source: str, **more: Any) -> httpx.Response:
    return http.post("/v1/adapters", json={"name": name, "source": source, **more})


def reasons(answer: httpx.Response) -> list[str]:
    return [reason["code"] for reason in answer.json()["error"].get("reasons", [])]


def test_a_tenant_uploads_a_folder_of_its_own(
    api: FakeServer, storage: tuple[str, Any], files: dict[str, bytes], place: Place
) -> None:
    source = put(storage, "acme/orders", files)
    http = api.client(SECRETS["acme"])
    answer = add(http, "acme/orders", source, digest=content_digest(files[CONFIG], files[WEIGHTS]))
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == content_digest(files[CONFIG], files[WEIGHTS])
    assert [adapter["adapter"] for adapter in http.get("/v1/adapters").json()["data"]] == ["acme/orders"]
    assert not list(place.store.glob("incoming/*")), "nothing is left"
    assert place.audit()[-1][:3] == ("upload", "acme/orders", "accepted")


def test_an_archive_is_the_same_adapter(
    api: FakeServer, storage: tuple[str, Any], files: dict[str, bytes]
) -> None:
    archive = packed(files)
    source = put(storage, "acme", {"a.tar.gz": archive}) + "/a.tar.gz"
    digest = f"sha256:{hashlib.sha256(archive).hexdigest()}"
    answer = add(api.client(SECRETS["acme"]), "acme/a", source, digest=digest)
    assert (answer.status_code, answer.json()["digest"]) == (
        201,
        content_digest(files[CONFIG], files[WEIGHTS]),
    )


def test_vllms_own_call_takes_the_same_addresses(
    api: FakeServer, storage: tuple[str, Any], files: dict[str, bytes]
) -> None:
    source = put(storage, "shared/x", files)
    admin = api.client(ADMIN_KEY)
    answer = admin.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": source})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'x' added successfully.")
    for path, status, code in [
        ("s3://bucket/acme/x", 403, "source_not_allowed"),
        ("s3://bucket/shared/" + "y" * 5000, 422, "source_malformed"),
        ("http://169.254.169.254/latest", 422, "source_malformed"),
    ]:
        body = {"lora_name": "y", "lora_path": path}
        answer = admin.post("/v1/load_lora_adapter", json=body)
        assert (answer.status_code, reasons(answer)) == (status, [code])


def test_a_presigned_url_of_the_bucket(
    place: Place, storage: tuple[str, Any], files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server without any credentials: https is another matter than the clouds; here the URL is http."""
    put(storage, "shared", {"a.tar.gz": packed(files)})
    url = storage[1].generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "shared/a.tar.gz"})
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setattr(clouds, "url", lambda _: url)
    given = {"remote_sources": ["https://host.example/"], "remote_endpoints": [storage[0]]}
    with place.server({}, INFERENCE_KEY, **given) as api:
        answer = add(
            api.client(ADMIN_KEY), "x", "https://host.example/bucket/a.tar.gz?X-Amz-Signature=secret"
        )
    assert answer.status_code == 201, answer.text


def test_who_may_read_what(
    api: FakeServer, storage: tuple[str, Any], files: dict[str, bytes], place: Place
) -> None:
    for folder in ("acme/x", "globex/x", "shared/x", "acme-evil/x"):
        put(storage, folder, files)
    for key, name, source, status, code in [
        (SECRETS["acme"], "acme/x", "s3://bucket/globex/x", 403, ["source_not_allowed"]),
        (SECRETS["acme"], "acme/x", "s3://bucket/shared/x", 403, ["source_not_allowed"]),
        (SECRETS["acme"], "acme/x", "s3://bucket/acme-evil/x", 403, ["source_not_allowed"]),
        (SECRETS["acme"], "acme/x", "s3://bucket/acme/../globex/x", 422, ["source_malformed"]),
        (SECRETS["acme"], "acme/x", "gs://bucket/acme/x", 403, ["source_not_allowed"]),
        (SECRETS["acme"], "acme/x", "https://169.254.169.254/latest/meta-data", 403, ["source_not_allowed"]),
        (SECRETS["acme"], "globex/x", "s3://bucket/acme/x", 403, []),
        (ADMIN_KEY, "x", "s3://bucket/acme/x", 403, ["source_not_allowed"]),
        (INFERENCE_KEY, "x", "s3://bucket/shared/x", 401, []),
    ]:
        answer = add(api.client(key), name, source)
        assert (answer.status_code, reasons(answer)) == (status, code), (name, source, answer.text)
    assert place.kept() == set()
    logged = [(name, decision, codes) for _, name, decision, codes in place.audit()]
    assert logged.count(("acme/x", "refused", ["source_not_allowed"])) == 5


def test_without_prefixes_nothing_is_read(place: Place, storage: tuple[str, Any]) -> None:
    place.keys.write_text(f'[tenants.acme.keys]\nci = "{SECRETS["acme"]}"\n')
    with place.server({}, INFERENCE_KEY, keys=str(place.keys), remote_endpoints=[storage[0]]) as api:
        for key, name in ((ADMIN_KEY, "x"), (SECRETS["acme"], "acme/x")):
            answer = add(api.client(key), name, "s3://bucket/acme/x")
            assert (answer.status_code, reasons(answer)) == (403, ["source_not_allowed"])


def test_an_endpoint_inside_has_to_be_allowed_by_name(place: Place) -> None:
    with place.server({}, INFERENCE_KEY, keys=str(place.keys)) as api:
        answer = add(api.client(SECRETS["acme"]), "acme/x", "s3://bucket/acme/x")
    assert (answer.status_code, reasons(answer)) == (403, ["source_address"])
    assert "127.0.0.1" not in answer.text


def test_what_the_bucket_refuses(
    api: FakeServer, storage: tuple[str, Any], files: dict[str, bytes], place: Place,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    http = api.client(SECRETS["acme"])
    put(storage, "acme/pickled", {CONFIG: files[CONFIG], "adapter_model.bin": b"pickle"})
    put(storage, "acme/large", {CONFIG: files[CONFIG], WEIGHTS: b"x" * (MAX_BYTES + 1)})
    put(storage, "acme/wrong", files)
    found = [
        add(http, "acme/x", "s3://bucket/acme/nothing"),
        add(http, "acme/x", "s3://bucket/acme/pickled"),
        add(http, "acme/x", "s3://bucket/acme/large"),
        add(http, "acme/x", "s3://bucket/acme/wrong", digest="0" * 64),
        add(http, "acme/x", "s3://bucket/acme/wrong", digest="sha256:short"),
    ]
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # a machine without a role
    clouds._store.cache_clear()
    found.append(add(http, "acme/x", "s3://bucket/acme/wrong"))
    assert [(answer.status_code, reasons(answer)) for answer in found] == [
        (422, ["source_not_found"]), (422, ["source_not_found"]), (422, ["too_large"]),
        (422, ["source_digest"]), (422, ["source_digest"]), (502, ["source_credentials"]),
    ]  # fmt: skip
    ours = [record.getMessage() for record in caplog.records if "safelora" in record.name]
    told = " ".join(ours) + json.dumps([answer.json() for answer in found])
    told += "".join(file.read_text() for file in (place.store / "audit").rglob("*") if file.is_file())
    for secret in ("X-Amz", "Signature", "127.0.0.1", *CREDENTIALS.values()):
        assert secret not in told
    assert place.kept() == set() and not list(place.store.glob("incoming/*"))


@pytest.mark.usefixtures("files")
def test_the_example(api: FakeServer, tmp_path: Path) -> None:
    source = "s3://bucket/shared/example"
    digest = s3_upload.put(tmp_path / "adapter", source)
    report = s3_upload.load(api.client(ADMIN_KEY), "example", source, digest)
    assert (report["adapter"], report["digest"]) == ("example", digest)


def _zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def _linked() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(f"a/{WEIGHTS}")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return stream.getvalue()


ARCHIVES = {
    "up.zip": (_zipped(f"../../{CONFIG}", b"{}"), "archive_unsafe"),
    "absolute.zip": (_zipped(f"/etc/{CONFIG}", b"{}"), "archive_unsafe"),
    "link.tar": (_linked(), "archive_unsafe"),
    "bomb.zip": (_zipped(CONFIG, b" " * 50_000_000), "too_large"),
    "page.tar.gz": (b"<html>AccessDenied</html>", "archive_malformed"),
    "empty.zip": (b"", "archive_malformed"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_with_tricks(name: str, api: FakeServer, storage: tuple[str, Any], place: Place) -> None:
    content, code = ARCHIVES[name]
    source = put(storage, "acme", {name: content}) + f"/{name}"
    answer = add(api.client(SECRETS["acme"]), "acme/x", source)
    assert answer.status_code == 422 and code in reasons(answer), answer.text
    assert place.kept() == set()


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x"}, {"name": "x", "source": 1}, {"name": "x", "source": None},
        {"name": "x", "source": "s3://bucket/acme/x", "path": "/etc"},
        {"name": "x", "source": "s3://bucket/acme/x", "credentials": {"key": "k"}},
        {"source": "s3://bucket/acme/x"}, {"name": "x", "source": "s" * 5000},
    ],
)  # fmt: skip
def test_bodies_that_are_not_valid(body: dict[str, Any], api: FakeServer) -> None:
    answer = api.client(SECRETS["acme"]).post("/v1/adapters", json=body)
    assert answer.status_code in (400, 403, 422) and "code" in answer.json()["error"]
