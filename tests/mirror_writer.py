"""Changes names of a mirrored store until it is killed: ``python -m tests.mirror_writer ROOT SEED``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from safelora_vllm.adapters.read import content_digest
from safelora_vllm.store import AdapterRecord, RawStore, Version
from safelora_vllm.store.mirror import open_names


def files(name: str, number: int) -> dict[str, bytes]:
    return {"adapter_config.json": name.encode(), "adapter_model.safetensors": b"%d" % number * 2000}


def add(root: Path, name: str, number: int) -> None:
    """A version of a name, as a server adds one: the upload first."""
    content = files(name, number)
    digest = content_digest(*content.values())
    RawStore(root).keep(digest, content)
    names = open_names(root)
    version = Version(0, digest, 1, 1, 0.0, "x", id=names.reserve_ids(1))
    names.update(name, lambda record: (record or AdapterRecord(name)).with_version(version))


def main() -> None:
    root, chance, number = Path(sys.argv[1]), random.Random(sys.argv[2]), 0
    print("ready", flush=True)
    while True:
        number += 1
        name = f"{root.name}{chance.randrange(3)}" if chance.random() < 0.8 else "shared"
        if chance.random() < 0.2:
            print(f"try {name} none", flush=True)
            open_names(root).update(name, lambda _: None)
        else:
            print(f"try {name} {content_digest(*files(name, number).values())}", flush=True)
            add(root, name, number)
        print("done", flush=True)


if __name__ == "__main__":
    main()
