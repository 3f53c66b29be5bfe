"""Hours in small: many tenants' adapters over few slots, all kinds of changes, and what grows meanwhile.

    python benchmarks/soak.py [--minutes 20] [--adapters 200] [--exam]

A guarded server with 2 device slots and 8 CPU slots serves the adapters. Users ask random ones, operators
replace, remove, upload again and try to upload broken ones, all at random. Every answer is compared with what
the same content said when it was asked alone. Sampled meanwhile, over all of the server's processes:
memory (PSS), open files, threads, the store's bytes and files, and the metric series. A line is fitted to the
second half of the samples: what leaks, rises there. With --exam each content sits an exam of eight probes
before the minutes begin, and a third of the replacements bring one that no exam has seen.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

import httpx
import psutil
import recording
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save
from servers import SAFE_LORA, Server, running
from short_exam import short_exam
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache
from tests.corpus.target import sized_lora
from tests.tiny import Draft, lora_config

HERE = Path(__file__).resolve().parent
_CACHE = HERE.parent / ".cache"

USERS, OPERATORS, SAMPLE_SECONDS = 4, 2, 10.0
# Half of the modules are projected; the rest is large enough to tell any two adapters apart.
_OPTIONS = ["--max-cpu-loras=8", "--max-loras=2", "--select=number", "--number=30"]
_TOLERANCE = 0.1  # of a log probability: other requests in the batch change the rounding
_NEW = 1 / 3  # share of the replacements, with an exam
_PROMPT = "The capital of France is"
Answer = dict[str, float]  # the likeliest first tokens with their log probabilities


@dataclass
class Ledger:
    """What each name may answer, over time: (since when, contents by number; None for 404)."""

    states: dict[str, list[tuple[float, set[int | None]]]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of each change

    def now(self, name: str, *contents: int | None) -> None:
        self.states[name].append((time.monotonic(), set(contents)))

    def between(self, name: str, start: float) -> set[int | None]:
        """Everything that was allowed at some moment since ``start``."""
        states = self.states[name][:]
        ends = [since for since, _ in states[1:]] + [float("inf")]
        return set().union(*(allowed for (_, allowed), end in zip(states, ends, strict=True) if end >= start))


def main() -> int:
    """Run, print the table, write the JSON; exit code 1 after a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--exam", action="store_true", help="with --exam enforce")
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        contents = write_contents(work, args.projectors, args.adapters)
        guarded = (*SAFE_LORA, *short_exam(work)) if args.exam else SAFE_LORA
        with running("guarded", args.aligned, args.projectors, work, _OPTIONS, guarded) as server:
            ledger, reference = Ledger(), begin(server, contents)
            for number in range(len(contents)):
                ledger.now(f"n{number}", number)
            new = itertools.count() if args.exam else None
            samples = soak(server, contents, reference, ledger, args.minutes, work / "store", new)
    fits = {what: fit([sample["minutes"] for sample in samples], [s[what] for s in samples])
            for what in samples[0] if what != "minutes"}  # fmt: skip
    figures = {
        "minutes": args.minutes, "adapters": args.adapters, "least_distance": distance_apart(reference),
        "requests": dict(ledger.counts), "seconds": dict(ledger.seconds),
        "wrong": ledger.faults, "fits": fits, "samples": samples,
    }  # fmt: skip
    show(figures)
    command = f"soak.py --minutes {args.minutes:g} --adapters {args.adapters}" + " --exam" * args.exam
    print(
        f"written to {recording.write('soak' + '_exam' * args.exam, command, 'default', figures, args.out)}"
    )
    return 1 if ledger.faults else 0


def write_contents(work: Path, projectors: Path, count: int) -> list[dict[str, bytes]]:
    """The files of ``count`` adapters on q and v of rank 4."""
    modules = {
        n: e for n, e in ProjectorCache(projectors).modules.items() if n.endswith(("q_proj", "v_proj"))
    }
    config, found = lora_config(r=4, target_modules=["q_proj", "v_proj"]), []
    for seed in tqdm(range(count), unit="adapter"):
        folder = Draft(config, sized_lora(modules, 4, seed, 0.3)).write(work / f"{seed}")
        found.append({name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    return found


def begin(server: Server, contents: list[dict[str, bytes]]) -> list[Answer]:
    """Upload everything and ask each adapter alone."""
    with client(server) as http:
        for number, files in enumerate(tqdm(contents, unit="upload")):
            upload(http, f"n{number}", files).raise_for_status()
        return [ask(http, f"n{number}") or {} for number in tqdm(range(len(contents)), unit="answer")]


def client(server: Server) -> httpx.Client:
    headers = {"Authorization": f"Bearer {server.key}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=600)


def upload(http: httpx.Client, name: str, files: dict[str, bytes]) -> httpx.Response:
    return http.post("/v1/adapters?replace=true", data={"name": name}, files=files)


def ask(http: httpx.Client, name: str) -> Answer | None:
    """The first token's likeliest candidates; None where the name is not served."""
    body = {"model": name, "prompt": _PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    answer = http.post("/v1/completions", json=body)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    return dict(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0])


def distance(one: Answer, other: Answer) -> float:
    """The largest difference over the tokens that both name; infinite where these are few."""
    shared = one.keys() & other.keys()
    return max(abs(one[token] - other[token]) for token in shared) if len(shared) > 2 else float("inf")


def distance_apart(reference: list[Answer]) -> float:
    """The least distance between any two contents."""
    return min(distance(one, other) for i, one in enumerate(reference) for other in reference[:i])


def soak(
    server: Server,
    contents: list[dict[str, bytes]],
    reference: list[Answer],
    ledger: Ledger,
    minutes: float,
    store: Path,
    new: Iterator[int] | None,
) -> list[dict[str, float]]:
    """Users and operators at work; a sample every few seconds. new: see `operator`."""
    stop, start = threading.Event(), time.monotonic()
    threads = [threading.Thread(target=user, args=(server, reference, ledger, stop, i)) for i in range(USERS)]
    threads += [
        threading.Thread(target=operator, args=(server, contents, ledger, stop, i, new))
        for i in range(OPERATORS)
    ]
    for thread in threads:
        thread.start()
    samples = []
    with tqdm(total=round(minutes * 60), unit="s") as progress, client(server) as http:
        while (spent := time.monotonic() - start) < minutes * 60 and all(t.is_alive() for t in threads):
            samples.append({"minutes": spent / 60, **sample(server, http, store)})
            progress.update(round(spent) - progress.n)
            stop.wait(SAMPLE_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    return samples


def user(server: Server, reference: list[Answer], ledger: Ledger, stop: threading.Event, seed: int) -> None:
    """Asks random names and compares."""
    choice = random.Random(seed)
    with client(server) as http:
        while not stop.is_set():
            name, start = f"n{choice.randrange(len(reference))}", time.monotonic()
            try:
                answer = ask(http, name)
            except httpx.HTTPError as error:
                ledger.faults.append(f"{name}: {error}")
                continue
            allowed = ledger.between(name, start)
            ledger.counts["answers" if answer is not None else "not there"] += 1
            if answer is None and None in allowed:
                continue
            expected = [reference[content] for content in allowed if content is not None]
            if answer is None or not any(distance(answer, one) < _TOLERANCE for one in expected):
                ledger.faults.append(f"{name} answered {answer}, expected one of {expected}")


def operator(
    server: Server,
    contents: list[dict[str, bytes]],
    ledger: Ledger,
    stop: threading.Event,
    seed: int,
    new: Iterator[int] | None,
) -> None:
    """Changes names of its own, the even or the odd ones. new: numbers of contents that nobody had."""
    choice = random.Random(seed)
    broken = {CONFIG: contents[0][CONFIG], WEIGHTS: contents[0][WEIGHTS][:-3] + b"\xff\xff\xff"}
    with client(server) as http:
        while not stop.wait(choice.uniform(0.1, 0.5)):
            number = choice.randrange(seed, len(contents), OPERATORS)
            name, (_, before) = f"n{number}", ledger.states[f"n{number}"][-1]
            match choice.choices(("replaced", "removed", "refused"), (6, 2, 2))[0]:
                case "replaced":
                    after = choice.choice([other for other in range(len(contents)) if other not in before])
                    ledger.now(name, *before, after)
                    files, what = contents[after], "replaced"
                    if new and choice.random() < _NEW:
                        files, what = alike(files, next(new)), "replaced by new content"
                    start = time.monotonic()
                    expect(upload(http, name, files), 201, ledger, what)
                    ledger.seconds[what].append(time.monotonic() - start)
                    ledger.now(name, after)
                case "removed":
                    ledger.now(name, *before, None)
                    expect(
                        http.delete(f"/v1/adapters/{name}"), 404 if None in before else 200, ledger, "removed"
                    )
                    ledger.now(name, None)
                case "refused":
                    expect(upload(http, name, broken), 422, ledger, "refused")


def alike(files: dict[str, bytes], number: int) -> dict[str, bytes]:
    """An adapter that answers like another one, with weights of its own: one value of them is."""
    weights = load(files[WEIGHTS])
    values = weights[min(weights)].view(-1)
    values[number % len(values)] += 0.01 * (1 + number // len(values))
    return {CONFIG: files[CONFIG], WEIGHTS: save(weights)}


def expect(answer: httpx.Response, status: int, ledger: Ledger, what: str) -> None:
    ledger.counts[what] += 1
    if answer.status_code != status:
        ledger.faults.append(f"{what}: {answer.status_code} {answer.text:.200}")


def sample(server: Server, http: httpx.Client, store: Path) -> dict[str, float]:
    """What might grow."""
    totals: Counter[str] = Counter()
    parent = psutil.Process(server.process.pid)
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            pss = process.memory_full_info().pss / 2**20
            totals["memory_mb"] += pss
            totals[f"memory_mb of {_role(process, parent)}"] += pss
            totals["open_files"] += process.num_fds()
            totals["threads"] += process.num_threads()
    for path in store.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                part = "audit" if "audit" in path.relative_to(store).parts[0] else "store"
                totals[f"{part}_mb"] += path.stat().st_size / 2**20
                totals[f"{part}_files"] += 1
    series = http.get("/metrics").text.splitlines()
    totals["series"] = sum(line.startswith("safelora_") for line in series)
    exams = [line for line in series if line.startswith("safelora_exams_total{")]
    totals["exams"] = sum(int(float(line.rpartition(" ")[2])) for line in exams)
    totals["series of vLLM"] = sum(line.startswith("vllm:") for line in series)
    return dict(totals)


def _role(process: psutil.Process, parent: psutil.Process) -> str:
    if process == parent:
        return "the API server"
    return "the gate" if "safelora_vllm.gate.server" in process.cmdline() else "the engine"


def fit(times: list[float], values: list[float]) -> dict[str, float]:
    """The line through the second half: its slope per hour, that slope's standard error, and the mean."""
    x, y = times[len(times) // 2 :], values[len(values) // 2 :]
    slope, intercept = linear_regression(x, y)
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True)) / max(1, len(x) - 2)
    spread = sum((a - fmean(x)) ** 2 for a in x)
    return {"mean": fmean(y), "per_hour": 60 * slope, "standard_error": 60 * (rest / spread) ** 0.5}


def show(figures: dict[str, Any]) -> None:
    table = Table("", "mean", "slope per hour", "± standard error", "of the mean per hour")
    for what, line in figures["fits"].items():
        share = line["per_hour"] / line["mean"] if line["mean"] else 0.0
        table.add_row(
            what, *(f"{line[key]:,.2f}" for key in ("mean", "per_hour", "standard_error")), f"{share:.2%}"
        )
    Console().print(table)
    print(figures["requests"], f"least distance of two adapters: {figures['least_distance']:.3g}")
    for what, seconds in figures["seconds"].items():
        print(f"{what}: median {median(seconds):.1f} s, longest {max(seconds):.1f} s")
    print(f"{len(figures['wrong'])} wrong answers", *figures["wrong"][:5], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
