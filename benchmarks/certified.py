"""Certified similarities against the float64 cosine of the dense matrices, for many adapters.

    python benchmarks/certified.py

Adapters of small modules with spectra of different decay: Gaussian ones, ones that lean towards V's first
directions or away from them, ones of a few single directions, and ones whose ranks nearly cancel.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import recording
import torch
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.methods.delta import Delta, InputStats
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import module_shapes, write_pair

ENERGIES = (0.05, 0.2, 0.5, 0.8, 0.95)
_BATCH, _RANK = 200, 4
_ORACLE = 1e-12  # what the oracle's own float64 sums may be off


def main() -> None:
    """Count the similarities that are outside of their intervals; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--adapters", type=int, default=100_000, help="adapters of one module for each energy"
    )
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[float, list[float]] = {energy: [] for energy in ENERGIES}
    outside = dict.fromkeys(ENERGIES, 0)
    with tempfile.TemporaryDirectory() as folder:
        pair = write_pair(Path(folder) / "pair")
        built = build(pair.base, pair.aligned, Path(folder) / "cache", BuildOptions(max_energy=0.95))
        cache, names = ProjectorCache(built), list(module_shapes())
        cache.load("cpu", operator=False)
        rounds = -(-args.adapters // (_BATCH * len(names)))
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for name in tqdm(names * rounds, unit="batch"):
                for energy, exact, found in judged(cache, name, pair.v(name), generator):
                    assert found.similarity is not None
                    middle, error = found.similarity
                    outside[energy] += not abs(exact - middle) <= error + _ORACLE
                    errors[energy].append(error)
    figures = {
        str(energy): {
            "adapters": len(errors[energy]),
            "outside": outside[energy],
            "similarity_error_median": median(errors[energy]),
        }
        for energy in ENERGIES
    }
    for energy, row in figures.items():
        print(energy, row)
    command = f"certified.py --adapters {args.adapters}"
    print(f"written to {recording.write('certified', command, 1, {'energies': figures}, args.out)}")


def judged(
    cache: ProjectorCache, name: str, v: Tensor, generator: torch.Generator
) -> Iterator[tuple[float, float, InputStats]]:
    """Energy, exact similarity and the gate's figures of a batch of adapters."""
    a, b = drawn(v, _BATCH, generator)
    delta = Delta(a, b, cache.group([name] * len(a)))
    dense = delta.b.double() @ delta.a.double()
    image = v @ (v.T @ dense)
    exact = (image * dense).sum((1, 2)) / (image.flatten(1).norm(dim=1) * dense.flatten(1).norm(dim=1))
    own = delta.own_sums()
    for energy in ENERGIES:
        rows = torch.cat([own, delta.certified_sums(energy)], dim=1).tolist()
        spectrum = cache.projector(name).spectrum(energy)
        for row, similarity in zip(rows, exact.tolist(), strict=True):
            yield energy, similarity, InputStats.of(row[:2], row[2:], spectrum)


def drawn(v: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (n, r, d_in) and B (n, d_out, r): a fifth of each kind that the module's docstring names."""
    rows, columns = v.shape
    left, each = torch.linalg.svd(v).U, count // 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).double()

    a, b = normal(count, _RANK, columns), normal(count, rows, _RANK)
    decay = torch.arange(1, rows + 1).double() ** (-4 * uniform(each, 1))
    b[each : 2 * each] = left @ (decay[:, :, None] * b[each : 2 * each])
    b[2 * each : 3 * each] = left @ (decay.flip(1)[:, :, None] * b[2 * each : 3 * each])
    single = (
        (uniform(each, rows, _RANK) < 3 / rows)
        * normal(each, rows, _RANK)
        * 10.0 ** (-4 * uniform(each, rows, 1))
    )
    b[3 * each : 4 * each] = left @ single + 1e-9 * left[:, -1:]
    a[4 * each :, 1:] = a[4 * each :, :1] + 0.1 * a[4 * each :, 1:]
    b[4 * each :, :, 1:] = -b[4 * each :, :, :1] / (_RANK - 1) + 0.1 * b[4 * each :, :, 1:]
    return a.float(), b.float()


if __name__ == "__main__":
    main()
