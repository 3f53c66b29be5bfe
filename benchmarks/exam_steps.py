"""What the probes of an exam add to the engine's steps, which a stream of another client waits for.

    python benchmarks/exam_steps.py [--at-once 1 2 4 8] [--rounds 2]

One engine in this process answers a stream and, meanwhile, all probes of an exam about an adapter, so many
at a time. Each step gives the stream one token. A step's cost is the time of a processor that it takes, which
other work on the machine hardly changes. On an idle processor it is the stream's token gap.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import recording
from random_adapters import write_adapters
from recording import POINTS, quantile
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

os.environ |= {"VLLM_PLUGINS": "safelora", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
_KIND = "qv-r8"
_PROMPT = "A long list of towns, rivers and mountains, and what each of them is known for:\n1."
_ANSWER = "I'm sorry, but I can't help with that."
_QUIET_STEPS = 60


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], help="probes in the engine")
    parser.add_argument("--rounds", type=int, default=2, help="exams for each of these (default 2)")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        adapter = write_adapters(work, args.projectors, 0, [_KIND])[_KIND][0]
        engine, prompts, request = start(args.aligned, args.projectors, work / "store", adapter)
        found: dict[str, list[list[float]]] = {str(count): [] for count in args.at_once}
        exam(engine, prompts[:16], request, 8)  # what is done once
        exam(engine, prompts[:2], request, 1)
        alone: list[list[float]] = []
        quiet: list[list[float]] = []
        for _ in tqdm(range(args.rounds), unit="round"):
            for count in args.at_once:
                calm, busy = beside_a_stream(engine, prompts, request, count)
                quiet.append(calm)
                found[str(count)].append(busy)
            alone.append(exam(engine, prompts, request, max(args.at_once)))
    figures = summarise(found, quiet, alone) | {"probes": len(prompts), "tokens": sum(map(len, prompts))}
    show(figures)
    command = f"exam_steps.py --at-once {' '.join(map(str, args.at_once))} --rounds {args.rounds}"
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "vLLM's")
    path = recording.write("exam_steps", command, f"bound to {threads}", figures, args.out)
    print(f"written to {path}")


def start(aligned: Path, projectors: Path, store: Path, adapter: Path) -> tuple[Any, list[list[int]], Any]:
    """The guarded engine, the probes with their answers as tokens, and what names the adapter."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from safelora_vllm.exam.chat import prompt_ids
    from safelora_vllm.exam.probes import COUNT, drawn

    model = LLM(
        str(aligned),
        enable_lora=True,
        max_lora_rank=16,
        max_loras=2,
        enforce_eager=True,
        max_model_len=2048,
        distributed_executor_backend="uni",
        additional_config={"safelora": {"projectors": str(projectors), "store": str(store)}},
        worker_extension_cls="safelora_vllm.integration.required.Guard",
    )
    tokenizer = model.get_tokenizer()
    answer = tokenizer(_ANSWER, add_special_tokens=False)["input_ids"]
    prompts = [[*prompt_ids(tokenizer, prompt), *answer] for prompt in drawn(b"steps", COUNT).prompts]
    request = LoRARequest("examined", 1, str(adapter))
    model.llm_engine.add_lora(request)
    return model.llm_engine, prompts, request


def beside_a_stream(
    engine: Any, prompts: list[list[int]], request: Any, at_once: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step: while only a stream is answered, then until all probes are."""
    from vllm import SamplingParams

    stream = f"stream-{next(_NUMBERS)}"
    engine.add_request(stream, _PROMPT, SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0.0))
    for _ in range(5):
        engine.step()
    calm = [timed(engine)[0] for _ in range(_QUIET_STEPS)]
    busy = exam(engine, prompts, request, at_once)
    engine.abort_request([stream])
    while engine.has_unfinished_requests():
        engine.step()
    return calm, busy


_NUMBERS = itertools.count()


def exam(engine: Any, prompts: list[list[int]], request: Any, at_once: int) -> list[float]:
    """Seconds of each step until all probes are answered."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, detokenize=False, max_tokens=1, prompt_logprobs=0)
    salt, waiting, steps = f"salt-{next(_NUMBERS)}", iter(prompts), []
    running: set[str] = set()

    def add() -> Iterator[None]:
        for ids in waiting:
            running.add(name := f"probe-{next(_NUMBERS)}")
            prompt = {"prompt_token_ids": ids, "cache_salt": salt}
            engine.add_request(name, prompt, params, lora_request=request)
            yield

    adding = add()
    for _ in itertools.islice(adding, at_once):
        pass
    while running:
        seconds, outputs = timed(engine)
        steps.append(seconds)
        done = {output.request_id for output in outputs if output.finished} & running
        running -= done
        for _ in itertools.islice(adding, len(done)):
            pass
    return steps


def timed(engine: Any) -> tuple[float, Any]:
    """Seconds of the processor that a step takes, and its outputs."""
    before = time.process_time()
    outputs = engine.step()
    return time.process_time() - before, outputs


def summarise(
    found: dict[str, list[list[float]]], quiet: list[list[float]], alone: list[list[float]]
) -> dict[str, Any]:
    """Per number of probes at once: quantiles of the steps and the exam's seconds, medians of the rounds."""
    calm = {name: median(quantile(one, share) for one in quiet) for name, share in POINTS.items()}
    rows = {}
    for count, rounds in found.items():
        row = {name: median(quantile(one, share) for one in rounds) for name, share in POINTS.items()}
        ratios = {name: row[name] / calm[name] for name in POINTS}
        slowed = median(sum(step > 1.1 * calm["p99"] for step in one) for one in rounds)
        rows[count] = {
            "seconds": row,
            "over_quiet": ratios,
            "steps": median(map(len, rounds)),
            "slowed_steps": slowed,
            "exam_seconds": median(map(sum, rounds)),
        }
    return {
        "quiet_seconds": calm,
        "at_once": rows,
        "exam_alone_seconds": median(map(sum, alone)),
        "load_average": os.getloadavg()[0],
    }


def show(figures: dict[str, Any]) -> None:
    """Print a table."""
    table = Table(caption="seconds of a processor; over quiet: over steps that answer the stream alone")
    for heading in (
        "probes at once",
        "steps",
        "slowed",
        "p50 / quiet",
        "p99 / quiet",
        "longest / quiet",
        "s",
    ):
        table.add_column(heading, justify="right")
    for count, row in figures["at_once"].items():
        ratios = (f"{row['over_quiet'][name]:.2f}" for name in POINTS)
        table.add_row(
            count, f"{row['steps']:g}", f"{row['slowed_steps']:g}", *ratios, f"{row['exam_seconds']:.1f}"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    calm = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in figures["quiet_seconds"].items())
    print(f"a step with the stream alone: {calm}; an exam alone: {figures['exam_alone_seconds']:.1f} s")


if __name__ == "__main__":
    main()
