"""Thin projector caches against an exact one: their size, what they select, and what Safe LoRA leaves.

    python benchmarks/thin.py

On the demo's pair of models. The adapters are those of `benchmarks/certified.py`, on every module of some
layers; the sizes are those of all layers. The truth is computed in float64, from V itself. A decision is less
safe where a module stays as it is that the truth would have projected. Safe LoRA with all modules selected
leaves more than the truth where its norm is larger by a millionth of what Ĉ leaves at most, over the root of
the delta's coherence: what is served is rounded to float32, relative to the ranks and not to their sum.

Also: how much of what input removal takes away comes back where R is kept in 16 bits.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from certified import drawn
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.methods import lowrank
from safelora_vllm.methods.delta import Delta, InputStats
from safelora_vllm.methods.selection import Interval, by_number, by_threshold
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import Projector, ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import WHOLE

ROOT = Path(__file__).resolve().parents[1]
ENERGIES = (0.4, 0.8, 0.95)
_THRESHOLDS, _NUMBER = (0.35, 0.5), 6
_LAYERS = 5  # every fifth
_REMOVED = 0.2  # the default policy's energy
_ROUNDING = 1e-6
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Similarities = list[dict[str, Interval]]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--adapters", type=int, default=300, help="on all modules; a multiple of 5")
    parser.add_argument(
        "--models", type=Path, default=ROOT / ".cache" / "models", help="with base and aligned"
    )
    parser.add_argument(
        "--projectors", type=Path, default=ROOT / ".cache" / "projectors", help="their exact cache"
    )
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, aligned = args.models / "base", args.models / "aligned"
    with tempfile.TemporaryDirectory() as folder:
        caches = {"exact": ProjectorCache(args.projectors)}
        for energy in ENERGIES:
            out = build(base, aligned, Path(folder) / str(energy), BuildOptions(max_energy=energy))
            caches[f"thin, {energy}"] = ProjectorCache(out)
        assert not caches["exact"].thin
        with torch.inference_mode():
            figures = measured(caches, Checkpoint(base), Checkpoint(aligned), args.adapters)
    for kind, row in figures["caches"].items():
        print(kind, row)
    print(figures["basis_dtypes"])
    print(
        f"written to {recording.write('thin', f'thin.py --adapters {args.adapters}', 1, figures, args.out)}"
    )


def measured(
    caches: Mapping[str, ProjectorCache], base: Checkpoint, aligned: Checkpoint, count: int
) -> dict[str, Any]:
    """All figures."""
    names = [name for name in caches["exact"].modules if int(name.split(".")[2]) % _LAYERS == 0]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Similarities] = {kind: [{} for _ in range(count)] for kind in ["truth", *caches]}
    retained: dict[str, list[float]] = {kind: [] for kind in found}
    above = dict.fromkeys(caches, 0)
    left: dict[str, list[float]] = {dtype: [] for dtype in _DTYPES}
    for name in tqdm(names, unit="module"):
        before, after = (model.read(f"{name}.weight").double() for model in (base, aligned))
        a, b = drawn(after - before, count, generator)
        similarities, whole, most = truth(after - before, Delta(a, b, caches["exact"].projector(name)))
        _add(found["truth"], name, similarities)
        retained["truth"] += whole
        for kind, cache in caches.items():
            similarities, norms, coherences = judged(cache, name, a, b)
            _add(found[kind], name, similarities)
            retained[kind] += norms
            above[kind] += sum(
                mine > of + _ROUNDING * most / coherence**0.5
                for mine, of, coherence in zip(norms, whole, coherences, strict=True)
            )
        for dtype, shares in comes_back(after - before, a[: count // 5], caches["exact"], name).items():
            left[dtype] += shares
    rows = {
        kind: {
            "bytes": sum(cache.tensor_bytes().values()),
            **decisions(found[kind], found["truth"]),
            "retained_median": median(retained[kind]),
            "retained_above_truth": above[kind],
        }
        for kind, cache in caches.items()
    }
    dtypes = {dtype: {"median": median(shares), "largest": max(shares)} for dtype, shares in left.items()}
    return {
        "adapters": count,
        "modules": len(names),
        "number": _NUMBER,
        "truth": {
            f"selected_{threshold}": sum(len(by_threshold(of, threshold).projected) for of in found["truth"])
            for threshold in _THRESHOLDS
        }
        | {"retained_median": median(retained["truth"])},
        "caches": rows,
        "basis_dtypes": dtypes,
    }


def _add(found: Similarities, name: str, similarities: list[Interval]) -> None:
    for adapter, similarity in zip(found, similarities, strict=True):
        adapter[name] = similarity


def truth(v: Tensor, delta: Delta) -> tuple[list[Interval], list[float], float]:
    """Similarities in float64, what Ĉ retains of each delta, and what it retains at most."""
    image = v @ (v.T @ delta.wide_b) / v.norm()
    sums = lowrank.product_sums(image, delta.wide_b, delta.gram).tolist()
    similarities = [Interval.exact(lowrank.cosine(*row) or 0.0) for row in sums]
    projector = delta.projector
    assert isinstance(projector, Projector)
    most = float(projector.energies[0]) * projector.entry.norm  # σ₁²/‖V‖_F
    return similarities, [(max(xx, 0.0) / yy) ** 0.5 for xx, _, yy in sums], most


def judged(
    cache: ProjectorCache, name: str, a: Tensor, b: Tensor
) -> tuple[list[Interval], list[float], list[float]]:
    """The gate's similarities of n deltas, what Safe LoRA would retain of each, and their coherences."""
    projector = cache.projector(name)
    delta = Delta(a, b, projector)
    known = delta.exact_sums() if projector.exact else delta.certified_sums(WHOLE)
    spectrum = None if projector.exact else projector.spectrum(WHOLE)
    served = delta.served_sums(delta.a, delta.image).tolist()
    similarities, retained, coherences = [], [], []
    for own, sums, new in zip(delta.own_sums().tolist(), known.tolist(), served, strict=True):
        came = InputStats.of(own, sums, spectrum)
        assert came.similarity is not None
        similarities.append(came.similarity)
        retained.append(came.served(*new).retained or 0.0)
        coherences.append(came.coherence)
    return similarities, retained, coherences


def decisions(found: Similarities, exact: Similarities) -> dict[str, Any]:
    """How many modules are selected, how many of them are uncertain, and how many decisions are less safe."""
    selections = {f"{threshold}": lambda of, x=threshold: by_threshold(of, x) for threshold in _THRESHOLDS}
    selections["number"] = lambda of: by_number(of, _NUMBER)
    row: dict[str, Any] = {}
    for title, select in selections.items():
        pairs = [(select(mine), select(theirs)) for mine, theirs in zip(found, exact, strict=True)]
        row[f"selected_{title}"] = sum(len(mine.projected) for mine, _ in pairs)
        row[f"uncertain_{title}"] = sum(len(mine.uncertain) for mine, _ in pairs)
        row[f"less_safe_{title}"] = sum(len(theirs.projected - mine.projected) for mine, theirs in pairs)
    return row


def comes_back(v: Tensor, a: Tensor, cache: ProjectorCache, name: str) -> dict[str, list[float]]:
    """‖RᵀA'ᵀ‖/‖A'‖ after A' = A − (A R) Rᵀ, with R from V in float64, and as it is kept in each dtype."""
    basis = cache.projector(name).input_basis(_REMOVED)
    exact = torch.linalg.svd(v, full_matrices=False).Vh[: basis.shape[1]].T
    found = {}
    for title, dtype in _DTYPES.items():
        taken = lowrank.component(a.mT, basis.to(dtype).to(torch.float32)).mT
        left = a.double() - taken
        found[title] = ((left @ exact).flatten(1).norm(dim=1) / left.flatten(1).norm(dim=1)).tolist()
    return found


if __name__ == "__main__":
    main()
