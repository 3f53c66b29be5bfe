"""A real S3 over HTTP on the loopback: moto's server, and the credentials for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "a-secret-for-this-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip


@contextmanager
def s3() -> Iterator[tuple[str, Any]]:
    """Its endpoint, and boto3's client for it, with the bucket ``bucket``. Skips without moto."""
    pytest.importorskip("obstore", reason="signs the URLs")
    moto = pytest.importorskip("moto.server", reason="is the object storage")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        client.create_bucket(Bucket="bucket")
        yield endpoint, client
    finally:
        server.stop()
