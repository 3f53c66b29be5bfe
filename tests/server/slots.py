"""What stands in vLLM's LoRA slots against what was published, and against an independent projection.

The first comparison has no tolerance. For the second, everything is computed once more in float64 from the
two checkpoints and the tenant's file, and the largest relative error of a module's ΔW is what counts:
``‖B A − ΔW'‖_F / ‖ΔW'‖_F``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from server import stop
from torch import Tensor

from tests.reference import similarity

REPOSITORY = Path(__file__).parents[2]
ROW_PARALLEL = {"o_proj", "down_proj"}
# Served weights are rounded to the LoRA dtype (bfloat16 has 8 bits of mantissa, float32 24), and so are the
# cache's tensors. On the way from A, B and V to ΔW' there are at most eight such roundings (A, B, V twice,
# three products, B'), each of at most half a unit in the last place, that is 2⁻⁹ and 2⁻²⁵ of a value. In
# float32, sums of up to 192 products add as much again; 2⁻²⁰ leaves room for any order of summation.
TOLERANCE = {torch.bfloat16: 8 * 2.0**-9, torch.float32: 2.0**-20}

Slots = dict[str, tuple[Tensor, Tensor]]  # module name → A (max_rank, d_in), B (d_out, max_rank)


@dataclass
class Engine:
    """An engine to start and its steps: each a method of `slot_reader.Driver` and arguments."""

    model: str
    options: dict[str, Any]
    steps: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, *step: Any) -> int:
        """Add a step; its place among the answers."""
        self.steps.append(step)
        return len(self.steps) - 1


def options(projectors: Path, store: Path, policy: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Options of a small guarded engine with LoRA."""
    section = {"projectors": str(projectors), "store": str(store), "policy": dict(policy)}
    small = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "enable_lora": True}
    return {**small, "additional_config": {"safelora": section}, **more}


# An engine that runs in the process that starts it: several can follow each other there.
IN_PROCESS = {"distributed_executor_backend": "uni"}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # its environment


@contextmanager
def one_thread() -> Iterator[None]:
    """For matrices of a few hundred rows: two threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(engines: list[Engine], folder: Path, env: Mapping[str, str], seconds: float) -> list[list[Any]]:
    """Run the engines one after another in a process of their own; the answers of each one's steps.

    ``folder/engine.log`` has what they said. Fails when they are not done in time.
    """
    job, answers, log = folder / "job.json", folder / "answers.json", folder / "engine.log"
    job.write_text(json.dumps([asdict(engine) for engine in engines]))
    settings = {"VLLM_PLUGINS": "safelora", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.slot_reader", str(job), str(answers)],
            cwd=REPOSITORY, env={**os.environ, **settings, **env},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        stop(process)
    done = json.loads(answers.read_text()) if answers.exists() else []
    assert len(done) == len(engines), log.read_text(errors="replace")[-6000:]
    return done  # type: ignore[no-any-return]


def read(folder: Path, rank: int = 0) -> Slots:
    """What `slot_reader.SlotReader.read_slots` saved of one rank."""
    tensors = load_file(folder / f"rank-{rank}.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors}
    return {module: (tensors[f"{module}.A"], tensors[f"{module}.B"]) for module in modules}


@dataclass(frozen=True)
class Adapter:
    """An adapter's file and, from PEFT itself, what each module's product is multiplied with."""

    folder: Path
    scales: Mapping[str, float]

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module → A (r, d_in), s·B (d_out, r), float64."""
        pairs = factors(self.folder)
        return {module: (a.double(), self.scales[module] * b.double()) for module, (a, b) in pairs.items()}


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A and B as they stand in a PEFT file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    name = "base_model.model.{}.lora_{}.weight".format
    return {module: (tensors[name(module, "A")], tensors[name(module, "B")]) for module in modules}


def published(store: Path, adapter: Path) -> Path:
    """The folder under which an adapter's content was published."""
    sides = [(adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    digest = hashlib.sha256(b"".join(hashlib.sha256(side).digest() for side in sides)).hexdigest()
    reports = (store / "published").glob("*/report.json")
    (folder,) = [r.parent for r in reports if json.loads(r.read_text())["report"]["digest"] == digest]
    return folder


def share(module: str, a: Tensor, b: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """A rank's part: of layers split by input their columns of A, of all others their rows of B."""
    if module.rpartition(".")[2] in ROW_PARALLEL:
        return a.chunk(size, dim=1)[rank], b
    return a, b.chunk(size, dim=0)[rank]


def from_published(slots: Slots, published: Path, rank: int = 0, size: int = 1) -> float:
    """The largest difference between slots and the published copy.

    Modules that the copy does not have must be zero, and so must ranks above its own: whatever else is
    there, a previous adapter left. All modules of the copy must be in the slots.
    """
    copy = factors(published)
    assert copy.keys() <= slots.keys(), f"never loaded: {sorted(copy.keys() - slots.keys())}"
    worst = 0.0
    for module, (a, b) in slots.items():
        expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
        if module in copy:
            part_a, part_b = share(module, *copy[module], rank, size)
            assert part_a.dtype == a.dtype, "vLLM's own cast would change the published weights"
            expected_a[: len(part_a)], expected_b[:, : part_b.shape[1]] = part_a, part_b
            assert part_a.shape[1] == a.shape[1] and part_b.shape[0] == b.shape[0], module
        for found, expected in ((a, expected_a), (b, expected_b)):
            worst = max(worst, float((found.double() - expected.double()).abs().max()))
    return worst


class Weights:
    """V of a model pair, straight from both checkpoints, in float64."""

    def __init__(self, base: Path, aligned: Path) -> None:
        self._files = [safe_open(folder / "model.safetensors", "pt") for folder in (base, aligned)]

    def v(self, module: str) -> Tensor:
        """W_aligned − W_base (d_out, d_in)."""
        before, after = (file.get_tensor(f"{module}.weight").double() for file in self._files)
        return after - before

    def w(self, module: str) -> Tensor:
        """W_aligned (d_out, d_in)."""
        return self._files[1].get_tensor(f"{module}.weight").double()

    def modules(self) -> set[str]:
        """Everything with a weight."""
        names = [name for name in self._files[1].keys() if name.endswith(".weight")]  # noqa: SIM118
        return {name.removesuffix(".weight") for name in names}


def least_similar(adapter: Adapter, weights: Weights, count: int) -> set[str]:
    """Safe LoRA's choice of ``count`` modules, by the dense float64 cosine."""
    cosines = {m: similarity(weights.v(m), a, b) for m, (a, b) in adapter.weights().items()}
    return set(sorted(cosines, key=lambda module: cosines[module])[:count])


@one_thread()
def from_projection(
    slots: Slots,
    adapter: Adapter,
    weights: Weights,
    rank: int = 0,
    size: int = 1,
    chosen: set[str] | None = None,
) -> float:
    """The largest relative error of a module's ΔW against the float64 projection of the original.

    ``chosen`` are projected, by default all; the others must be what the tenant gave.
    """
    worst = 0.0
    for module, (a, b) in adapter.weights().items():
        if module not in slots:  # another pipeline stage has it
            continue
        if chosen is None or module in chosen:
            v = weights.v(module)  # Ĉ B, as `tests.reference.operator` has it, but without forming Ĉ
            b = v @ (v.T @ b) / torch.linalg.matrix_norm(v)
        part_a, part_b = share(module, a, b, rank, size)
        found_a, found_b = (side.double() for side in slots[module])
        difference = _norm(torch.cat([found_b, -part_b], dim=1), torch.cat([found_a, part_a]))
        worst = max(worst, difference / _norm(part_b, part_a))
    return worst


def _norm(left: Tensor, right: Tensor) -> float:
    """``‖left · right‖_F`` of a tall and a wide matrix, from their QR factors."""
    tall, wide = torch.linalg.qr(left).R, torch.linalg.qr(right.T).R
    return float(torch.linalg.matrix_norm(tall @ wide.T))
