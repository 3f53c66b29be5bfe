"""What FP8 rounding does to V: caches of FP8 checkpoints against those of the original weights.

    python benchmarks/fp8.py [--base DIR] [--aligned DIR] [--layers 0 10 20 29]

The linear layers of some layers of the demo pair are rounded to float8_e4m3fn, with a scale for each row and
with one for each tile of 128 × 128. The aligned model is rounded, or both are. Compared with the V before:

- ‖V‖_F, as a multiple;
- k, the directions that hold the default policy's share of ‖V‖_F²;
- how much of the energy that the original R holds lies in as many directions of the rounded V's R.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from torch import Tensor

from safelora_vllm.policy import Policy
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.fp8 import Block, dequantised
from safelora_vllm.projectors.selection import select_modules

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / ".cache" / "models"
_LARGEST = 448.0
FORMS: dict[str, Block] = {"one scale a row": (1, None), "one scale a tile of 128 × 128": (128, 128)}
SIDES = ("the aligned model", "both models")


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=MODELS / "base")
    parser.add_argument("--aligned", type=Path, default=MODELS / "aligned")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, aligned = Checkpoint(args.base), Checkpoint(args.aligned)
    names = [
        name
        for name in select_modules(base, aligned, ())
        if any(f".layers.{layer}." in name for layer in args.layers)
    ]
    energy = Policy().energy
    rows: dict[str, list[dict[str, float]]] = {}
    changes = []
    for name in names:
        before, after = base.weight(name), aligned.weight(name)
        original = Directions(after - before)
        k = original.count(energy)
        held = original.held_by(original.right[:, :k])
        changes.append(float((after - before).norm() / after.norm()))
        for form, block in FORMS.items():
            for side in SIDES:
                start = rounded(before, block) if side == "both models" else before
                found = Directions(rounded(after, block) - start)
                rows.setdefault(f"{form}, {side}", []).append(
                    {
                        "norm": found.norm / original.norm,
                        "k": found.count(energy) / k,
                        "kept": original.held_by(found.right[:, :k]) / held,
                    }
                )
    figures: dict[str, Any] = {
        "modules": len(names),
        "energy": energy,
        "change_over_weight_median": round(median(changes), 5),
        "cases": {case: summary(found) for case, found in rows.items()},
    }
    print(figures)
    command = f"fp8.py --layers {' '.join(map(str, args.layers))}"
    print(f"written to {recording.write('fp8', command, 1, figures, args.out)}")


def summary(found: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the modules, and the least that is kept."""

    def of(key: str) -> list[float]:
        return [row[key] for row in found]

    return {
        "norm_median": round(median(of("norm")), 2),
        "k_median": round(median(of("k")), 2),
        "kept_median": round(median(of("kept")), 3),
        "kept_least": round(min(of("kept")), 3),
    }


class Directions:
    """V's right singular vectors as columns, the largest first, and the shares of energy that they hold."""

    def __init__(self, v: Tensor) -> None:
        _, values, right = torch.linalg.svd(v, full_matrices=False)
        self.v, self.right, self.norm = v, right.T, float(v.norm())
        self.shares = values.square().cumsum(0) / values.square().sum()

    def count(self, energy: float) -> int:
        """As `build` counts."""
        return min(int((self.shares < energy - 1e-9).sum()) + 1, len(self.shares))

    def held_by(self, directions: Tensor) -> float:
        """The share of V's energy in some orthonormal directions."""
        return float((self.v @ directions).square().sum()) / self.norm**2


def rounded(weight: Tensor, block: Block) -> Tensor:
    """A weight after a round trip through FP8, the largest value of each block at float8_e4m3fn's largest."""
    rows, columns = weight.shape
    height, width = block[0] or rows, block[1] or columns
    scales = torch.stack(
        [
            torch.stack([tile.abs().max() for tile in torch.split(band, width, dim=1)])
            for band in torch.split(weight, height, dim=0)
        ]
    )
    scales = (scales / _LARGEST).float()
    by_row = scales.double().repeat_interleave(height, 0)[:rows]
    by_value = by_row.repeat_interleave(width, 1)[:, :columns]
    stored = (weight / by_value).clamp(-_LARGEST, _LARGEST).float().to(torch.float8_e4m3fn)
    return dequantised(stored, scales, block)


if __name__ == "__main__":
    main()
