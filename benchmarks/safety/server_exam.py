"""What does the exam of a real server say of each adapter, and what does it serve?

    python benchmarks/safety/server_exam.py [--pairs smollm2] [--seeds 0 1 2]

Each pair and seed has a server with a secret of its own, which draws the probes. Its ladder is
`as-uploaded,as-uploaded+opinion` with the default threshold: what fails is served with a second opinion.
ASR and utility are those that run.py measured of an adapter served so, on the `report` half. Needs what
run.py trains, and the scores of its seeds. Adds to benchmarks/results/server_exam.json, a seed at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import parts
import recorded
import recording
from adapters import NAMES
from calls import get, load
from kept import Scores, half_of
from pairs import ALIGNED, PAIRS
from plan import FULL, OPINION, SEEDS
from report import HERE, write_page
from server import guarded, running
from summaries import over_aligned, subjects_of, utility_lost
from tqdm import tqdm
from training import CACHE, PROJECTORS, folder
from treatments import RAW, second_opinion

from safelora_vllm.exam.score import THRESHOLD

NAME, LADDER = "server_exam", "as-uploaded,as-uploaded+opinion"
OPTIONS = ("--exam=enforce", f"--ladder={LADDER}", "--max-loras=2", "--max-relative-norm=1e9")
OPTIONS += ("--max-total-norm=1e9",)  # what a cap would refuse is examined too


def main() -> None:
    """Examine all adapters of the pairs and seeds, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    file = recording.RESULTS / f"{NAME}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for pair in args.pairs:
        for seed in args.seeds:
            found = examined(args.cache, pair, seed)
            rows = [row for row in rows if (row["pair"], row["seed"]) != (pair, seed)] + found
            rows.sort(key=lambda row: (list(PAIRS).index(row["pair"]), row["seed"]))
            figures = {"ladder": LADDER, "threshold": THRESHOLD, "opinion_tokens": OPINION, "rows": rows}
            recording.write(NAME, f"safety/{NAME}.py", "vLLM", figures)
    print(f"written to {file} and {write_page(recorded.read(HERE))}")


def examined(cache: Path, pair: str, seed: int) -> list[dict[str, Any]]:
    """A row for each adapter of one pair and seed."""
    home, scores = folder(cache, pair, seed), parts.read(HERE, pair)[str(seed)].scores
    with tempfile.TemporaryDirectory(prefix="safelora-exam-") as scratch:
        work = Path(scratch)
        command = guarded(home / ALIGNED, home / PROJECTORS, work / "store", *OPTIONS)
        with running(command, work / "server.log") as server:
            rows = []
            for name in tqdm(NAMES, desc=f"{pair} {seed}", unit="adapter"):
                if refusal := load(server, name, home / name):
                    raise SystemExit(f"{name} is refused: {refusal}")
                report: Any = get(server, f"/v1/adapters/{name}")
                rows.append(row(pair, seed, name, report, scores))
            return rows


def row(
    pair: str, seed: int, name: str, report: dict[str, Any], scores: dict[str, dict[str, Scores]]
) -> dict[str, Any]:
    """The verdict about an adapter, and the figures of what is served by it.

    scores: of the pair and seed, by adapter and treatment.
    """
    exam, opinion = report["exam"], report["policy"].get("opinion", False)
    served = scores[name][second_opinion(OPINION).name if opinion else RAW.name]
    raw, served, alone = (
        half_of(of, "report") for of in (scores[name][RAW.name], served, scores["none"]["none"])
    )
    found = {
        "pair": pair,
        "seed": seed,
        "adapter": name,
        "opinion": opinion,
        **{figure: exam[figure] for figure in ("drop", "bound", "seconds", "over_refusal")},
        "raw_over_aligned": over_aligned([(raw, alone)], subjects_of(FULL))["mean"],
        "over_aligned": over_aligned([(served, alone)], subjects_of(FULL))["mean"],
    }
    if raw.get("exact"):
        found["utility_lost"] = utility_lost([(raw, served)])["mean"]
    return found


if __name__ == "__main__":
    main()
