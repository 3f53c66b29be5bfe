"""What a request costs on this state of the code, against another: one-token completions, in turns.

    python benchmarks/request_cost.py --baseline REVISION [--blocks 20]

Both guarded servers run at once and are asked in turns, a block of requests each, so that what else the
machine does meets both. A vLLM worker spins for a second after a request: between blocks it is waited for.
Prints the ratio of the medians, and the same for each server's odd against its even blocks: how far from 1
chance alone gets.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import recording
from servers import Server, running
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BLOCK, WARM_UP = 25, 5  # requests; the first ones of a block do not count
SPIN_SECONDS = 1.5
BODY = json.dumps({"model": "aligned", "prompt": "The capital of France is", "max_tokens": 1})


@contextmanager
def state(revision: str | None, folder: Path) -> Iterator[Path]:
    """The code at a revision, in a folder of its own; this checkout without one."""
    if revision is None:
        yield ROOT
        return
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", folder, revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


@contextmanager
def server(code: Path, scratch: Path, models: Path) -> Iterator[Server]:
    """A guarded server that runs this code."""
    scratch.mkdir()
    os.environ["PYTHONPATH"] = str(code)
    with running("guarded", models / "models" / "aligned", models / "projectors", scratch, []) as started:
        yield started


def ask(connection: http.client.HTTPConnection) -> float:
    """Seconds of one request."""
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    return time.perf_counter() - start


def median(blocks: list[list[float]]) -> float:
    """Of all requests of these blocks."""
    return statistics.median(seconds for block in blocks for seconds in block)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--baseline", required=True, metavar="REVISION", help="the other state of the code")
    parser.add_argument("--blocks", type=int, default=20, help="of each server")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with (
            state(given.baseline, scratch / "code") as old,
            server(old, scratch / "old", ROOT / ".cache") as before,
            server(ROOT, scratch / "new", ROOT / ".cache") as now,
        ):
            ports = (before.port, now.port)
            times: list[list[list[float]]] = [[], []]
            for _ in tqdm(range(given.blocks), desc="Blocks of requests", unit="pair"):
                for which in random.sample((0, 1), 2):
                    time.sleep(SPIN_SECONDS)
                    # A connection a block: the server closes one that was idle for 5 s.
                    connection = http.client.HTTPConnection("127.0.0.1", ports[which], timeout=60)
                    times[which].append([ask(connection) for _ in range(BLOCK)][WARM_UP:])
                    connection.close()
    old, new = map(median, times)
    chance = [median(blocks[::2]) / median(blocks[1::2]) for blocks in times]
    print(f"p50 of a one-token completion: now / {given.baseline} = {new / old:.3f}")
    print(f"by chance (odd / even blocks of one server): {chance[0]:.3f} and {chance[1]:.3f}")
    command = f"python benchmarks/request_cost.py --baseline {given.baseline}"
    figures = {
        "blocks": given.blocks,
        "requests_each": BLOCK - WARM_UP,
        "ratio_p50": new / old,
        "ratio_by_chance": chance,
    }
    print(recording.write("request_cost", command, "vLLM's", figures))


if __name__ == "__main__":
    main()
