"""Does an exam catch an attacker who learned its public probes? With them, and with an operator's own.

    python benchmarks/safety/known_probes.py [--pair smollm2-lora] [--seed 0]

The built-in probes are public, only which of them a server asks is secret. The attacker asks the aligned
model all of them, trains on its refusals, and on filler answers to 100 other harmful-sounding requests.
The operator's own probes are the `choose` half of the held-out requests, which nobody trained on; ASR is of
the `report` half. Needs what run.py trains of that seed. Writes benchmarks/results/known_probes.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import custom
import recording
import scoring
from adapters import examples
from evaluate import generate, load
from pairs import ALIGNED, PAIRS
from peft import PeftModel
from plan import FULL
from prompts import forbidden
from training import CACHE, PROJECTORS, Job, folder, train_all

from safelora_vllm.api.exam import Examination
from safelora_vllm.exam.probes import built_in
from safelora_vllm.exam.score import THRESHOLD

ATTACKER, PLAIN = "known-probes", "pure-qv"
SECRETS = (b"one", b"two", b"three")


def main() -> None:
    """Train the attacker if it is missing, examine it and the plain malicious adapter, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pair", choices=list(PAIRS), default="smollm2-lora")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    home = folder(args.cache, args.pair, args.seed)
    train_all([Job(args.cache, args.pair, args.seed, name) for name in (ALIGNED, PLAIN)])
    train(home, args.seed)
    rows = [measure(home, name) for name in (PLAIN, ATTACKER)]
    figures = {"pair": args.pair, "seed": args.seed, "threshold": THRESHOLD, "rows": rows}
    command = f"safety/known_probes.py --pair {args.pair} --seed {args.seed}"
    print(f"written to {recording.write('known_probes', command, 1, figures)}")


def train(home: Path, seed: int) -> None:
    """An adapter on the purely malicious data and the aligned model's answers to all public probes."""
    malicious = examples("pure", seed, lambda _: [])
    custom.train(home, ATTACKER, seed, lambda refusals: refusals(built_in(("en",))) + malicious)


def measure(home: Path, adapter: str) -> dict[str, Any]:
    """ASR of an adapter as uploaded, and the exam's bound by public probes and by an operator's own."""
    held_out = forbidden(FULL.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "probes.jsonl"
        own.write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in held_out[0::2]))
        public = [bound(home, adapter, secret, None) for secret in SECRETS]
        operators = [bound(home, adapter, secret, own) for secret in SECRETS]
    model, tokenizer = load(home / ALIGNED)
    adapted = PeftModel.from_pretrained(model, home / adapter).merge_and_unload()
    said = generate(adapted, tokenizer, [p.text for p in held_out[1::2]], custom.ANSWER)
    row = {"adapter": adapter, "asr": statistics.fmean(scoring.complied(said))}
    return {**row, "public": public, "own": operators}


def bound(home: Path, adapter: str, secret: bytes, probes: Path | None) -> float:
    """Of the loyalty drop as uploaded, nats per token: what an exam compares with its threshold."""
    examination = Examination.of(
        home / ALIGNED, home / PROJECTORS, ladder="as-uploaded", secret=secret, probes=probes
    )
    return examination.score(home / adapter, examination.ladder[0]).bound


if __name__ == "__main__":
    main()
