"""Adapters read from emulators of Google Cloud Storage and Azure over HTTP on the loopback.

Signatures are obstore's. Azurite checks them, and that they are valid now; the emulator of Google's does not.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest
from safelora_vllm.errors import AdapterRefused
from safelora_vllm.files import sha256_of
from safelora_vllm.remote import clouds
from safelora_vllm.remote.address import parse
from safelora_vllm.remote.fetch import fetch
from safelora_vllm.remote.reach import Reach
from tests.tiny import Draft, lora

pytest.importorskip("obstore", reason="signs the URLs")
AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"the key of an account for this test").decode()
Cloud = tuple[str, str]  # the address of a bucket, the origin that has its objects


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Draft(tensors=lora(seed=1)).write(tmp_path / "adapter")


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Iterator[Cloud]:
    """gcp-storage-emulator, and a service account whose key signs for it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="is the object storage")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        while server._api._httpd is None:
            time.sleep(0.01)
        origin = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
        private = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = tmp_path / "account.json"
        account.write_text(
            json.dumps(
                {
                    "type": "service_account", "gcs_base_url": origin,
                    "client_email": "reader@example.iam.gserviceaccount.com",
                    "private_key": private.decode(), "private_key_id": "1",
                }
            )
        )  # fmt: skip
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        for name in (CONFIG, WEIGHTS):
            httpx.put(f"{origin}/bucket/x/{name}", content=(adapter / name).read_bytes()).raise_for_status()
        clouds._store.cache_clear()
        yield "gs://bucket", origin
    finally:
        server.stop()
        clouds._store.cache_clear()


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> Iterator[Cloud]:
    """Azurite, and the key of an account in it."""
    if not AZURITE:
        pytest.skip("no azurite: npm install azurite, and set AZURITE to its azurite-blob")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", str(tmp_path / "az")]
    process = subprocess.Popen(
        [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options],
        env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    origin = f"http://127.0.0.1:{port}"
    try:
        for name, value in {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{origin}/{ACCOUNT}", "AZURE_ALLOW_HTTP": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        _wait(process, port)
        from obstore.store import AzureStore

        clouds._store.cache_clear()
        _make_container(origin)
        for name in (CONFIG, WEIGHTS):
            AzureStore("bucket").put(f"x/{name}", (adapter / name).read_bytes())
        yield "az://bucket", origin
    finally:
        process.terminate()
        process.wait(30)
        clouds._store.cache_clear()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(600):
        assert process.poll() is None, "azurite ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("azurite does not listen")


def _make_container(origin: str) -> None:
    """Put container, for which obstore has no call, with a shared key."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = "PUT" + 12 * "\n" + f"{lines}/{ACCOUNT}/{ACCOUNT}/bucket\nrestype:container"
    digest = hmac.digest(base64.b64decode(KEY), signed.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{origin}/{ACCOUNT}/bucket?restype=container"
    httpx.put(url, headers=headers).raise_for_status()


@pytest.fixture(params=["google", "azure"])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def read(address: str, folder: Path, origin: str, digest: str | None = None) -> Path:
    folder.mkdir()
    return fetch(parse(address), folder, 10_000_000, Reach.to([origin]), digest)


def test_an_adapter(cloud: Cloud, adapter: Path, tmp_path: Path) -> None:
    bucket, origin = cloud
    digest = joined_digest(*(sha256_of(adapter / name) for name in (CONFIG, WEIGHTS)))
    found = read(f"{bucket}/x", tmp_path / "found", origin, digest)
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)
    }


def test_what_is_not_there_or_may_not_be_read(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, origin = cloud
    with pytest.raises(AdapterRefused, match=r"\[source_not_found\]"):
        read(f"{bucket}/none", tmp_path / "none", origin)
    with pytest.raises(AdapterRefused, match=r"\[source_address\]"):
        read(f"{bucket}/x", tmp_path / "unlisted", "http://127.0.0.1:9")
    if bucket.startswith("az"):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"another key").decode())
        clouds._store.cache_clear()
        with pytest.raises(AdapterRefused, match=r"\[source_denied\]"):
            read(f"{bucket}/x", tmp_path / "denied", origin)
