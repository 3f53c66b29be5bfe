"""The sizes of a projector cache in docs/deployment.md, computed from the shapes of a model.

python -m tests.test_sizing_docs     writes the table anew
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from safelora_vllm.methods import METHODS
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import MAX_ENERGY, BuildOptions
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.projector import Parts

DOCUMENT = Path(__file__).parents[1] / "docs" / "deployment.md"
BLOCK = re.compile(
    r"(<!-- sizes: written by python -m tests\.test_sizing_docs -->\n)(.*?)(<!-- end -->)", re.S
)
# Llama 3 8B: hidden size 4096, intermediate size 14336, 8 key-value heads of 128, 32 layers.
LAYERS = 32
SHAPES = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
EXACT = BuildOptions(exact=True)
ELEMENT, BASIS, SHARE = torch.bfloat16.itemsize, torch.float32.itemsize, torch.float64.itemsize


@dataclass(frozen=True)
class Sizes:
    """Bytes of one module.

    projector: Ĉ, or V where that is smaller. inputs: R. outputs: L. shares: of energy.
    """

    projector: int
    inputs: int
    outputs: int
    shares: int


def sizes(shape: tuple[int, int], inputs: int, outputs: int, kept: int) -> Sizes:
    """Of a module of ``--form auto``, with so many directions of R and L held, and so many in the cache."""
    d_out, d_in = shape
    return Sizes(
        ELEMENT * d_out * min(d_out, d_in), BASIS * d_in * inputs, BASIS * d_out * outputs, SHARE * kept
    )


def held(shape: tuple[int, int], directions: int, kept: int) -> Sizes:
    """Where every module is selected: so many directions of R and L, and neither Ĉ nor V."""
    return replace(sizes(shape, directions, directions, kept), projector=0)


def thin_sizes(shape: tuple[int, int], kept: int) -> Sizes:
    """Of a module in a cache without Ĉ and V."""
    return replace(sizes(shape, kept, kept, kept), projector=0)


def held_thin(shape: tuple[int, int], kept: int) -> Sizes:
    """All of L of a thin cache: where modules are selected by similarity, or Ĉ would be multiplied by."""
    return replace(thin_sizes(shape, kept), inputs=0)


def most(shape: tuple[int, int], energy: float) -> int:
    """Directions that hold an energy, at most: the largest singular values come first."""
    return math.ceil(energy * min(shape))


def total(size: Callable[[tuple[int, int]], Sizes]) -> int:
    """Of the whole model."""
    return LAYERS * sum(sum(vars(size(shape)).values()) for shape in SHAPES.values())


def in_gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def written_table() -> str:
    default, csulora, kept = Policy().energy, METHODS["csulora"].energy, EXACT.max_energy
    lines = [f"| module | d_out × d_in | Ĉ or V | R at energy {default}, at most |", "|---|---|--:|--:|"]
    for name, shape in SHAPES.items():
        size = sizes(shape, most(shape, default), 0, 0)
        form = "Ĉ" if shape[0] <= shape[1] else "V"
        lines.append(f"| `{name}` | {shape[0]} × {shape[1]} | {form}: {size.projector:,} | {size.inputs:,} |")
    projectors = total(lambda shape: sizes(shape, 0, 0, 0))
    inputs = total(lambda shape: sizes(shape, most(shape, default), 0, 0)) - projectors
    lines.append(f"| **all, times {LAYERS} layers** | | **{projectors:,}** | **{inputs:,}** |")
    lines += ["", "| what | bytes | |", "|---|--:|--:|"]

    def row(what: str, nbytes: int) -> None:
        lines.append(f"| {what} | {nbytes:,} | {in_gib(nbytes)} |")

    row("gate, `safe-lora`, exact cache", total(lambda shape: sizes(shape, 0, 0, most(shape, kept))))
    row(
        "gate, `safe-lora`, thin cache, at most",
        total(lambda shape: held_thin(shape, most(shape, MAX_ENERGY))),
    )
    row(
        f"gate, `input-removal` at energy {default}, `--select all`, at most",
        total(lambda shape: held(shape, most(shape, default), most(shape, kept))),
    )
    row(
        f"gate, `csulora` at energy {csulora}, `--select all`, at most",
        total(lambda shape: held(shape, most(shape, csulora), most(shape, kept))),
    )
    row(
        f"disk, with `--exact`, whose `--max-energy` is {kept}, at most",
        total(lambda shape: sizes(shape, most(shape, kept), most(shape, kept), most(shape, kept))),
    )
    row(
        f"disk, thin, whose `--max-energy` is {MAX_ENERGY}, at most",
        total(lambda shape: thin_sizes(shape, most(shape, MAX_ENERGY))),
    )
    return "\n".join(lines)


def written(text: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{written_table()}\n{found[3]}", text)


def test_the_table_is_computed() -> None:
    text = DOCUMENT.read_text()
    assert BLOCK.search(text)
    assert text == written(text), "run python -m tests.test_sizing_docs"


@pytest.fixture
def cache(build_cache: Callable[[str, str], Path]) -> ProjectorCache:
    """As ``build`` makes it with ``exact``."""
    return ProjectorCache(build_cache(EXACT.dtype, EXACT.form))


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (Policy(method="safe-lora"), Parts(True, 0.0, 0.0)),
        (Policy(), Parts(False, 0.2, 0.2)),
        (Policy(select="number"), Parts(True, 0.2, 0.0)),
        (Policy(method="csulora"), Parts(False, 0.95, 0.95)),
        (Policy(method="csulora", select="threshold"), Parts(True, 0.95, 0.95)),
    ],
    ids=["safe-lora", "the default", "number", "csulora", "csulora, threshold"],
)
def test_a_gate_holds_as_much_as_the_formula_says(
    cache: ProjectorCache, policy: Policy, parts: Parts
) -> None:
    assert parts_read(policy, thin=False) == parts
    inputs, outputs = parts.input_energy, parts.output_energy
    loaded = ProjectorCache(cache.folder)
    loaded.load("cpu", None, inputs, outputs, parts.operator)
    least = most_held = 0
    for name, entry in loaded.modules.items():
        projector = loaded.projector(name)
        shares = len(projector.energies)
        assert projector.directions(inputs) <= most(entry.shape, inputs)
        needed = sizes(entry.shape, projector.directions(inputs), projector.directions(outputs), shares)
        allowed = sizes(entry.shape, most(entry.shape, inputs), most(entry.shape, outputs), shares)
        unread = 0 if parts.operator else needed.projector
        least += sum(vars(needed).values()) - unread
        most_held += sum(vars(allowed).values()) - unread
    # Modules of one shape keep equally many directions: the most that one of them needs.
    assert least <= loaded.resident_bytes()["device"] <= most_held
    if inputs == outputs == 0.0:
        assert least == most_held


def test_a_cache_is_as_large_as_the_formula_says(cache: ProjectorCache) -> None:
    kept = {name: len(cache.projector(name).energies) for name in cache.modules}
    found = [sizes(entry.shape, kept[name], kept[name], kept[name]) for name, entry in cache.modules.items()]
    assert sum(ProjectorCache(cache.folder).resident_bytes().values()) == sum(
        sum(vars(size).values()) for size in found
    )


def test_a_thin_cache_is_as_large_as_the_formula_says(thin: ProjectorCache) -> None:
    kept = {name: len(thin.projector(name).energies) for name in thin.modules}
    found = [thin_sizes(entry.shape, kept[name]) for name, entry in thin.modules.items()]
    assert sum(ProjectorCache(thin.folder).resident_bytes().values()) == sum(
        sum(vars(size).values()) for size in found
    )


def test_a_gate_with_a_thin_cache_holds_all_of_its_output_directions(thin: ProjectorCache) -> None:
    loaded, parts = ProjectorCache(thin.folder), parts_read(Policy(method="safe-lora"), thin=True)
    loaded.load("cpu", None, parts.input_energy, parts.output_energy, parts.operator)
    kept = {name: len(loaded.projector(name).energies) for name in loaded.modules}
    found = [held_thin(entry.shape, kept[name]) for name, entry in loaded.modules.items()]
    assert loaded.resident_bytes()["device"] == sum(sum(vars(size).values()) for size in found)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
