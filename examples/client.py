"""A tenant's day: upload an adapter, talk to it, replace it, go back, remove it.

SAFELORA_KEY=... python examples/client.py ADAPTER [--name acme/mine] [--url http://localhost:8000]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import httpx
from openai import OpenAI

FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> None:
    """Each step prints what the server answered."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", type=Path, help="a folder that PEFT saved")
    parser.add_argument("--name", default="mine", help="a tenant's is TENANT/NAME (default mine)")
    parser.add_argument("--url", default="http://localhost:8000")
    args = parser.parse_args()
    if not (key := os.environ.get("SAFELORA_KEY")):
        parser.error("set SAFELORA_KEY to an admin's or a tenant's key")
    # Where the server has an exam, an upload waits for one of each rung of the ladder.
    http = httpx.Client(base_url=args.url, headers={"Authorization": f"Bearer {key}"}, timeout=1800)
    chat = OpenAI(base_url=f"{args.url}/v1", api_key=key)

    files = {name: (args.adapter / name).read_bytes() for name in FILES}
    answer = http.post("/v1/adapters", data={"name": args.name}, files=files)
    if answer.is_error:
        raise SystemExit(f"refused: {answer.json()['error']['message']}")
    report = answer.json()
    projected = sum(module["decision"] == "projected" for module in report["modules"])
    print(f"version {report['version']}: {projected} of {len(report['modules'])} modules projected")

    reply = chat.chat.completions.create(
        model=args.name, messages=[{"role": "user", "content": "Hello!"}], max_tokens=32
    )
    print(f"{args.name}: {reply.choices[0].message.content}")

    config = json.loads(files[FILES[0]])
    weaker = {**files, FILES[0]: json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}).encode()}
    again = http.post("/v1/adapters", params={"replace": "true"}, data={"name": args.name}, files=weaker)
    print(f"replaced: version {again.json()['version']}")
    back = http.post(f"/v1/adapters/{args.name}/rollback", json={"version": 1})
    print(f"rolled back: version {back.json()['version']}, {back.json()['reason']}")
    print(f"removed: {http.delete(f'/v1/adapters/{args.name}').json()}")


if __name__ == "__main__":
    main()
