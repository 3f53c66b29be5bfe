"""LoRA operators on a CPU: vLLM's, which copy a slot's weights for every row, against this package's.

    python benchmarks/slot_operators.py [--quick] [--threads N] [--repeats N]

Both multiply the same rows by the same slots, in turn; rows of one slot follow each other, as in prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops as vllm_operators

from safelora_vllm.integration.seams.fixes import slot_operators

_ROWS = ((1, 1), (4, 4), (16, 4), (64, 1), (64, 4), (64, 32), (2048, 1), (2048, 4))  # rows, slots in use
_SHAPES = ((576, 576, 8), (1536, 576, 16), (4096, 4096, 16))  # d_in, d_out, r
_SCALE = 0.5


def main() -> None:
    """Measure all sizes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only: no result")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (default 1)")
    parser.add_argument("--repeats", type=int, default=9, help="of each side and size (default 9)")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = [
        measure(rows, slots, shape, args.repeats)
        for rows, slots in (_ROWS[:2] if args.quick else _ROWS)
        for shape in (_SHAPES[:1] if args.quick else _SHAPES)
    ]
    show(figures)
    command = f"slot_operators.py --threads {args.threads} --repeats {args.repeats}" + " --quick" * args.quick
    path = recording.write("slot_operators", command, args.threads, {"sizes": figures}, args.out)
    print(f"written to {path}")


def measure(rows: int, slots: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Seconds of vLLM's shrink and expand, and times by which this package's are faster.

    Raises:
        AssertionError: the results differ by more than bfloat16 rounds.
    """
    width, out, rank = shape
    torch.manual_seed(0)
    a = torch.randn(max(4, slots), 1, rank, width, dtype=torch.bfloat16)
    b = torch.randn(max(4, slots), 1, out, rank, dtype=torch.bfloat16)
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    slot = torch.arange(rows) * slots // rows
    figures: dict[str, Any] = {"rows": rows, "slots": slots, "d_in": width, "d_out": out, "rank": rank}
    between = torch.zeros(rows, rank)

    def shrink() -> Tensor:
        vllm_operators.bgmv_shrink(x, a, between, slot, _SCALE)
        return between

    def own_shrink() -> Tensor:
        slot_operators.shrink(x, a, between, slot, _SCALE)
        return between

    def expand() -> Tensor:
        result = torch.zeros(rows, out, dtype=torch.bfloat16)
        vllm_operators.bgmv_expand_slice(between, b, result, slot, 0, out)
        return result

    def own_expand() -> Tensor:
        result = torch.zeros(rows, out, dtype=torch.bfloat16)
        slot_operators.expand_slice(between, b, result, slot, 0, out)
        return result

    sides = {"shrink": (shrink, own_shrink), "expand": (expand, own_expand)}
    for name, (theirs, ours) in sides.items():
        torch.testing.assert_close(theirs().clone(), ours().clone(), rtol=2e-2, atol=0.5)
        seconds, own_seconds = in_turn(theirs, ours, repeats)
        figures[name] = {"vllm_seconds": seconds, "times_faster": seconds / own_seconds}
    return figures


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, seconds in zip((first, second), found, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return median(found[0]), median(found[1])


def show(figures: list[dict[str, Any]]) -> None:
    """A line for each size."""
    table = Table(title="times faster than vLLM's operators on this processor")
    for head in ("rows", "slots", "d_in → d_out", "r", "shrink", "expand"):
        table.add_column(head, justify="right")
    for one in figures:
        faster = [f"{one[name]['times_faster']:.1f}" for name in ("shrink", "expand")]
        table.add_row(
            str(one["rows"]), str(one["slots"]), f"{one['d_in']} → {one['d_out']}", str(one["rank"]), *faster
        )
    Console().print(table)


if __name__ == "__main__":
    main()
