"""What a second opinion costs the requests for an adapter: two servers, one with --second-opinion 16.

    python benchmarks/second_opinion.py

Both have the demo's order-to-json and are asked in turn, with the same instructions, which the aligned model
does not refuse. Of each round: seconds to the first token and to the last of one request, and of 16 at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import recording
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "training"))

from instructions import instructions
from servers import Server, running

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "order-to-json"
TOKENS, OPINION, TOGETHER = 64, 16, 16
MEASURES = ("first token", "one answer", f"{TOGETHER} answers at once")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "models")
    parser.add_argument("--projectors", type=Path, default=ROOT / ".cache" / "projectors")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    prompts = iter(instructions("train", args.rounds * (TOGETHER + 1), seed=0))
    with ExitStack() as stack:
        servers = []
        for more in ([], [f"--second-opinion={OPINION}"]):
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            given = "guarded", args.models / "aligned", args.projectors, scratch, ["--max-num-seqs=64"]
            servers.append(stack.enter_context(running(*given, guarded=more)))
            servers[-1].load(ADAPTER, ROOT / "examples" / "adapters" / ADAPTER)
        rounds = []
        for number in tqdm(range(args.rounds), unit="round"):
            asked = [next(prompts) for _ in range(TOGETHER + 1)]
            order = (0, 1) if number % 2 else (1, 0)
            found = {which: asyncio.run(measured(servers[which], asked)) for which in order}
            rounds.append([found[0], found[1]])
    rows = []
    for at, name in enumerate(MEASURES):
        without, with_it = ([one[which][at] for one in rounds] for which in (0, 1))
        ratios = [after / before for before, after in zip(without, with_it, strict=True)]
        rows.append({"measure": name, "ratio": statistics.median(ratios), "ratios": ratios})
        print(f"{name}: {rows[-1]['ratio']:.2f} times")
    figures: dict[str, Any] = {"tokens": TOKENS, "opinion": OPINION, "rounds": args.rounds, "rows": rows}
    command = f"second_opinion.py --rounds {args.rounds}"
    print(f"written to {recording.write('second_opinion', command, 'vLLM default', figures, args.out)}")


async def measured(server: Server, prompts: list[str]) -> list[float]:
    """Seconds of each of `MEASURES`."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=600) as http:
        first, last = await _answer(http, prompts[0])
        start = time.perf_counter()
        await asyncio.gather(*(_answer(http, prompt) for prompt in prompts[1:]))
        return [first, last, time.perf_counter() - start]


async def _answer(http: httpx.AsyncClient, prompt: str) -> tuple[float, float]:
    body = {
        "model": ADAPTER, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    start, first = time.perf_counter(), None
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first is None and line.startswith("data: {") and _text(line):
                first = time.perf_counter() - start
    assert first is not None, "an answer has text"
    return first, time.perf_counter() - start


def _text(line: str) -> str:
    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
    return choice["delta"].get("content") or ""


if __name__ == "__main__":
    main()
