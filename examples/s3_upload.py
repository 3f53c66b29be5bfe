"""Puts an adapter into a bucket and lets a guarded server load it from there.

pip install '.[remote]' 'moto[server]'   # in the checkout
python -m moto.server -p 5000 &       # a stand-in for S3
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_REGION=us-east-1 AWS_ENDPOINT_URL=http://127.0.0.1:5000
curl -X PUT $AWS_ENDPOINT_URL/bucket
safelora-vllm serve ALIGNED --projectors DIR --remote-source s3://bucket --remote-endpoint $AWS_ENDPOINT_URL &
export SAFELORA_KEY=...                # an admin's, or a tenant's for a name and a source of its own
python examples/s3_upload.py order-to-json examples/adapters/order-to-json s3://bucket/order-to-json
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import obstore
from obstore.store import S3Store

FILES = ("adapter_config.json", "adapter_model.safetensors")


def put(folder: Path, source: str) -> str:
    """Both files into the bucket; returns the adapter's digest, which the server is to find."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    store = S3Store(bucket, client_options={"allow_http": True})
    sides = b""
    for name in FILES:
        content = (folder / name).read_bytes()
        obstore.put(store, f"{prefix}/{name}", content)
        sides += hashlib.sha256(content).digest()
    return hashlib.sha256(sides).hexdigest()


def load(http: httpx.Client, name: str, source: str, digest: str) -> dict[str, Any]:
    """Let the server download, judge and serve it; returns the report."""
    answer = http.post("/v1/adapters", json={"name": name, "source": source, "digest": digest})
    if answer.is_error:
        sys.exit(f"status {answer.status_code}: {answer.json()['error']['message']}")
    return dict(answer.json())


def main() -> None:
    name, folder, source = sys.argv[1:]
    if not (key := os.environ.get("SAFELORA_KEY")):
        sys.exit("set SAFELORA_KEY to an admin's or a tenant's key")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(
        base_url=os.environ.get("URL", "http://localhost:8000"), headers=headers, timeout=1800
    ) as http:
        report = load(http, name, source, put(Path(folder), source))
    print(f"{report['adapter']} is served: {report['digest']}, {len(report['modules'])} modules")


if __name__ == "__main__":
    main()
