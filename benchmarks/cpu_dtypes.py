"""Which dtype is the faster one to serve on this CPU? 32 short answers, each dtype in turn.

    python benchmarks/cpu_dtypes.py [--rounds 3]

Each round starts vLLM's engine once for each dtype, without a guard. Medians are compared, and what the CPU
can do is recorded, for the answer is another one where it multiplies bfloat16 itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import recording
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "training"))

MODEL = Path(__file__).resolve().parents[1] / ".cache" / "models" / "aligned"
NAME = "cpu_dtypes"
DTYPES = ("float32", "bfloat16")
PROMPTS, TOKENS = 32, 12
_SAYS = "seconds: "


def main() -> None:
    """Measure, print the ratio, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=DTYPES, help="print the seconds of one dtype and stop")
    args = parser.parse_args()
    if args.only:
        print(f"{_SAYS}{seconds(args.only)}")
        return
    taken: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for dtype in tqdm(DTYPES * args.rounds, unit="engine"):
        command = [sys.executable, __file__, f"--only={dtype}"]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        (said,) = [line for line in done.stdout.splitlines() if line.startswith(_SAYS)]  # vLLM prints, too
        taken[dtype].append(float(said.removeprefix(_SAYS)))
    import torch

    ratio = statistics.median(taken["bfloat16"]) / statistics.median(taken["float32"])
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}: bfloat16 takes {ratio:.1f} times as long as float32")
    file = recording.RESULTS / f"{NAME}.json"
    by_capability = json.loads(file.read_text())["by_capability"] if file.exists() else {}
    by_capability[capability] = {"bfloat16_over_float32": ratio, "seconds": taken}
    figures = {"by_capability": dict(sorted(by_capability.items()))}
    recording.write(NAME, f"cpu_dtypes.py --rounds {args.rounds}", "vLLM default", figures)


def seconds(dtype: str) -> float:
    """For all answers at once, after a few to warm up."""
    from data import forbidden_prompts
    from vllm import LLM, SamplingParams

    model = LLM(str(MODEL), dtype=dtype, enforce_eager=True, max_model_len=512)
    chats = [[{"role": "user", "content": prompt}] for prompt in forbidden_prompts("train", PROMPTS)]
    settings = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    model.chat(chats[:2], settings, use_tqdm=False)
    start = time.perf_counter()
    model.chat(chats, settings, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
