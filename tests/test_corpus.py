"""Every hostile adapter of the corpus against the gate: its answer, its time, its memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import UsageError
from safelora_vllm.gate.admit import Admission, GateSettings
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from safelora_vllm.tenants.principal import check_name
from tests.corpus import CORPUS, NAME, ROWS, TAKEN, Hostile, Target
from tests.refusing import codes, judge
from tests.tiny import Pair, key

SECONDS = 10.0  # of a processor for one answer: 0.3 at most here, but machines are shared
MEMORY = 100 * 1024**2  # for one answer beyond what is held before: the largest file that is read has 32 MiB
# A name that is taken only a server knows: tests/server/test_corpus_live.py.
JUDGED = [case for case in CORPUS if case.codes != {TAKEN}]


@pytest.fixture(scope="module")
def target(pair: Pair, cache: ProjectorCache) -> Target:
    """The tiny pair."""
    return Target.of(cache, pair.base, pair.aligned)


@contextmanager
def bounded() -> Iterator[None]:
    """The block must take little time and memory. Linux counts a process's peak anew after this write."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert memory("VmHWM") - before < MEMORY


def memory(figure: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(figure))


def test_every_row_of_the_attack_table_has_its_cases() -> None:
    assert len(CORPUS) >= 120
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    rows = Counter(case.row for case in CORPUS)
    assert set(rows) == set(ROWS) and min(rows.values()) >= 4
    assert all(case.codes or case.means for case in CORPUS)


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: f"{case.row}-{case.name}")
def test_the_answer_to_each(
    case: Hostile, target: Target, cache: ProjectorCache, store: PublishedStore, tmp_path: Path
) -> None:
    path = case.write(tmp_path / "adapter", target)
    with bounded():
        if NAME in case.codes:
            with pytest.raises(UsageError):
                check_name(case.served_as)
            return
        check_name(case.served_as)
        admission = judge(path, GateSettings(cache, Policy(method="safe-lora", select="all")), store)
    if not admission.report.accepted:
        assert codes(admission) <= case.codes
        return
    assert case.means is not None, "this must be refused"
    check_published(admission, case, target)
    if case.later is not None:
        case.later(path)
        check_published(admission, case, target)


def check_published(admission: Admission, case: Hostile, target: Target) -> None:
    """What is served is Ĉ ΔW in every module, ΔW being what the adapter stands for (float64, from V)."""
    assert admission.folder is not None and case.means is not None
    assert {file.name for file in admission.folder.iterdir()} == {CONFIG, WEIGHTS, "report.json"}
    served = load_file(admission.folder / WEIGHTS)
    meant = case.means(target)
    assert set(served) == {key(module, side) for module in meant for side in "AB"}
    for module, delta in meant.items():
        v = target.alignment(module)
        size = torch.linalg.matrix_norm(v)
        found = served[key(module, "B")].double() @ served[key(module, "A")].double()
        error = torch.linalg.matrix_norm(found - v @ (v.T @ delta) / size)
        # Ĉ and B are float32: 2⁻²⁴ per value, and ‖Ĉ ΔW‖ ≤ ‖V‖ ‖ΔW‖, whatever cancels in it.
        assert error <= 1e-6 * size * torch.linalg.matrix_norm(delta), module
