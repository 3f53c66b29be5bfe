"""Upload every PEFT adapter in a folder, with progress; those already there in the same content are skipped.

    python examples/upload_folder.py ADAPTERS --url http://localhost:8000 --prefix acme/

The key is taken from SAFELORA_KEY (an admin's or a tenant's). Exit code 1 if any was refused.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import httpx
from tqdm import tqdm

FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> int:
    """Upload, then say what was refused and why."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of adapter folders")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--prefix", default="", help="put before each name, e.g. acme/")
    args = parser.parse_args()
    adapters = sorted(path.parent for path in args.folder.glob(f"*/{FILES[0]}"))
    if not adapters:
        parser.error(f"{args.folder} has no folder with an {FILES[0]}")
    if not (key := os.environ.get("SAFELORA_KEY")):
        parser.error("set SAFELORA_KEY to an admin's or a tenant's key")
    headers = {"Authorization": f"Bearer {key}"}
    problems = []
    with httpx.Client(base_url=args.url, headers=headers, timeout=1800) as http:
        for folder in tqdm(adapters, unit="adapter"):
            answer = upload(http, args.prefix + folder.name, folder)
            if answer.is_error:
                problems.append((folder.name, answer.status_code, answer.text))
    for name, status, text in problems:
        print(f"{name}: {status} {text}", file=sys.stderr)
    print(f"{len(adapters) - len(problems)} of {len(adapters)} adapters are served")
    return 1 if problems else 0


def upload(http: httpx.Client, name: str, folder: Path) -> httpx.Response:
    """One upload, unless this content is served already; repeated while the server asks to come later."""
    present = http.get(f"/v1/adapters/{name}")
    if present.is_success and present.json()["digest"] == digest(folder):
        return present
    while True:
        with (folder / FILES[0]).open("rb") as config, (folder / FILES[1]).open("rb") as weights:
            answer = http.post(
                "/v1/adapters",
                params={"replace": "true"},
                data={"name": name},
                files={FILES[0]: config, FILES[1]: weights},
            )
        if answer.status_code not in (429, 503):
            return answer
        time.sleep(float(answer.headers.get("Retry-After", "1")))


def digest(folder: Path) -> str:
    """The name that the server gives to an adapter's content."""
    return hashlib.sha256(
        b"".join(hashlib.sha256((folder / name).read_bytes()).digest() for name in FILES)
    ).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
