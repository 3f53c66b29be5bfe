"""kill -9 of the server at random moments of uploading, replacing and removing; what is there afterwards.

    python benchmarks/crash.py [--rounds 100] [--engine none|vllm] [--mirror] [--exam]

Each round starts a server on the same store, lets clients change names, kills the server and all its
processes after a random time, reads the whole store ('store verify'), and starts the next server, which
must serve every acknowledged upload and no name of which the removal was acknowledged. ``--engine none``
runs this package's HTTP side and its real gate process without vLLM's engine, which starts in seconds;
``vllm`` the real server. With ``--mirror`` rounds take turns on two stores that share a bucket of a local S3
(moto): whatever the next server serves, it has from the bucket. With ``--exam`` the server has ``--exam
enforce`` before an engine that answers by a script: a third of the adapters passes on no rung, a third on
the last one only. Nothing that is served, now or after a start, may be without a verdict that it passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import recording
from random_adapters import write_adapters
from scripted_exam import HARMFUL, Kinds, unexamined, without_verdict
from tqdm import tqdm

from safelora_vllm.adapters.read import content_digest

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent))

from server import ADMIN_KEY, free_port, guarded

HERE = Path(__file__).resolve().parent
_CACHE = HERE.parent / ".cache"


FILES = ("adapter_config.json", "adapter_model.safetensors")
CLIENTS, NAMES_EACH = 3, 4
MIRROR = "s3://bucket/crash"
CHURN_SECONDS, WITH_EXAMS_SECONDS = 2.7, 8.0  # at most, until a server is killed
MADE_SECONDS = 60.0  # until a server has published copies of what others had stored


@dataclass
class Ledger:
    """What clients were told: name → digest, None for none. unsure: names whose last change was not answered.
    refusals: of the exam. looks: at what is served, while changes are made. in_exams: rounds that ended with
    a copy that no exam had judged. faults: what must not be."""

    acknowledged: dict[str, str | None] = field(default_factory=dict)
    unsure: dict[str, set[str | None]] = field(default_factory=dict)
    changes: int = 0
    interrupted: int = 0
    refusals: int = 0
    looks: int = 0
    in_exams: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run the rounds, print a summary, write the JSON; exit code 1 if anything was lost or half done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--engine", choices=("none", "vllm"), default="none")
    parser.add_argument("--mirror", action="store_true", help="two stores in turn, which share a bucket")
    parser.add_argument("--exam", action="store_true", help="with --exam enforce; needs --engine none")
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    if args.exam and (args.engine != "none" or args.mirror):
        parser.error("--exam is not for --engine vllm or --mirror: its adapters are harmful by a script")
    ledger, moments = Ledger(), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch, bucket() if args.mirror else nullcontext():
        work = Path(scratch)
        adapters = write_adapters(work, args.projectors, 8, ["qv-r8"])["qv-r8"]
        kinds = Kinds.of([digest_of(adapter) for adapter in adapters]) if args.exam else None
        if kinds:
            kinds.write(work / "kinds.json")
        for number in tqdm(range(args.rounds + 1), unit="round"):
            store = work / (f"store{number % 2}" if args.mirror else "store")
            process, http = start(args, work, store)
            try:
                check_served(http, ledger, number)
                look(http, store, kinds, ledger)
                before = without_verdict(store)
                if number < args.rounds:
                    churn(process, http, adapters, ledger, moments, store, kinds)
            finally:
                kill(process)
            ledger.in_exams += args.exam and not without_verdict(store) <= before
            check_store(store, ledger.faults, number)
    figures = {
        "engine": args.engine,
        "mirror": args.mirror,
        "exam": args.exam,
        "rounds": args.rounds,
        "acknowledged_changes": ledger.changes,
        "interrupted_changes": ledger.interrupted,
        "refused_by_the_exam": ledger.refusals,
        "looks_at_what_is_served": ledger.looks,
        "rounds_killed_in_an_exam": ledger.in_exams,
        "faults": ledger.faults,
    }
    print(json.dumps(figures, indent=1))
    command = f"crash.py --rounds {args.rounds} --engine {args.engine}{' --mirror' * args.mirror}"
    command += " --exam" * args.exam
    name = f"crash_{args.engine}{'_mirror' * args.mirror}{'_exam' * args.exam}"
    print(f"written to {recording.write(name, command, 'default', figures, args.out)}")
    return 1 if ledger.faults else 0


@contextlib.contextmanager
def bucket() -> Iterator[None]:
    """A bucket of a local S3, which outlives the servers, and the environment that leads to it."""
    from tests.moto_server import CREDENTIALS, s3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    with s3() as (endpoint, _):
        os.environ |= {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
        yield


def start(
    args: argparse.Namespace, work: Path, store: Path, options: Sequence[str] = (), seconds: float = 300
) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    """A server on a store, answering."""
    port = free_port()
    if args.engine == "vllm":
        options = ("--method=safe-lora", f"--port={port}", *options)
        command = guarded(args.aligned, args.projectors, store, *options)
    else:
        script = str(HERE / "without_engine.py")
        command = [sys.executable, script, f"--aligned={args.aligned}", f"--projectors={args.projectors}"]
        command += [f"--store={store}", f"--port={port}"]
        command += [f"--exam={work / 'kinds.json'}"] if args.exam else []
    command += [f"--store-mirror={MIRROR}"] if args.mirror else []
    env = {**os.environ, "SAFELORA_ADMIN_API_KEY": ADMIN_KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (work / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/v1/adapters").status_code == 200:
                return process, http
        except httpx.TransportError:
            time.sleep(0.2)
    kill(process)
    raise RuntimeError(f"the server did not start:\n{(work / 'server.log').read_text()[-3000:]}")


def churn(
    process: subprocess.Popen[bytes],
    http: httpx.Client,
    adapters: list[Path],
    ledger: Ledger,
    moments: random.Random,
    store: Path,
    kinds: Kinds | None,
) -> None:
    """Clients upload, replace and remove until the server is killed, after a random time."""
    threads = [
        threading.Thread(
            target=client, args=(str(http.base_url), index, adapters, ledger, moments.random(), kinds)
        )
        for index in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 0.3 + (WITH_EXAMS_SECONDS if kinds else CHURN_SECONDS) * moments.random()
    while (left := until - time.monotonic()) > 0:
        look(http, store, kinds, ledger)
        time.sleep(min(left, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()


def look(http: httpx.Client, store: Path, kinds: Kinds | None, ledger: Ledger) -> None:
    """Whether all that is served at this moment has passed the exam."""
    if kinds is not None:
        ledger.faults += unexamined(http.get("/v1/adapters").json()["data"], store, kinds)
        ledger.looks += 1


def digest_of(adapter: Path) -> str:
    """As reports name a content."""
    return content_digest(*((adapter / file).read_bytes() for file in FILES))


def client(
    url: str, index: int, adapters: list[Path], ledger: Ledger, seed: float, kinds: Kinds | None
) -> None:
    """One client with names of its own, so that it knows what each should serve."""
    choice = random.Random(seed)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=120) as http:
        while True:
            name, adapter = f"client{index}-{choice.randrange(NAMES_EACH)}", choice.choice(adapters)
            files = {file: (adapter / file).read_bytes() for file in FILES}
            removing = choice.random() < 0.25
            digest = content_digest(*files.values())
            refused = kinds is not None and not removing and kinds[digest] == HARMFUL
            after = None if removing else ledger.acknowledged.get(name) if refused else digest
            ledger.unsure[name] = {ledger.acknowledged.get(name), after}
            try:
                if removing:
                    answer = http.delete(f"/v1/adapters/{name}")
                    good = answer.status_code in (200, 404)
                else:
                    answer = http.post("/v1/adapters?replace=true", data={"name": name}, files=files)
                    # 200: the name has this content.
                    good = answer.status_code in ((422,) if refused else (200, 201))
            except httpx.TransportError:
                ledger.interrupted += 1
                return
            if not good:
                ledger.faults.append(f"{name}: {answer.status_code} {answer.text:.200}")
            ledger.acknowledged[name] = after
            ledger.unsure.pop(name)
            ledger.changes += not refused
            ledger.refusals += refused


def check_served(http: httpx.Client, ledger: Ledger, number: int) -> None:
    """What the new server serves against what clients were told. What it has to make first, it may."""
    deadline = time.monotonic() + MADE_SECONDS
    while True:
        reports = http.get("/v1/adapters").json()["data"]
        served = {report["adapter"]: report["digest"] for report in reports}
        names = {*ledger.acknowledged, *ledger.unsure, *served}
        right = all(served.get(n) in ledger.unsure.get(n, {ledger.acknowledged.get(n)}) for n in names)
        if right or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    for name in sorted({*ledger.acknowledged, *ledger.unsure, *served}):
        allowed = ledger.unsure.get(name, {ledger.acknowledged.get(name)})
        found = served.get(name)
        if found not in allowed:
            ledger.faults.append(f"round {number}: {name} serves {found}, expected one of {allowed}")
        ledger.acknowledged[name] = found
    ledger.unsure.clear()


def check_store(store: Path, faults: list[str], number: int) -> None:
    """Everything in the store is whole; leftovers of the killed processes may lie there."""
    command = [str(Path(sys.executable).with_name("safelora-vllm")), "store", "verify"]
    run = subprocess.run([*command, f"--adapter-store={store}"], capture_output=True, text=True)
    if run.returncode != 0:
        faults.append(f"round {number}: store verify: {run.stdout:.500}{run.stderr[-500:]}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the server's session at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
