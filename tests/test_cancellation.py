"""Ranks that cancel: what is measured must be what is served, in every arithmetic, by every policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.policy import METHOD_NAMES, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.corpus.cancelling import forged, opposite_ends
from tests.refusing import codes, judge
from tests.tiny import Draft, key

POLICIES = {
    "threshold": Policy(method="safe-lora", threshold=0.4),
    "number": Policy(method="safe-lora", select="number", number=99),
    **{method: Policy(method=method, select="all", energy=0.8) for method in METHOD_NAMES},
}


@pytest.mark.parametrize("hidden", [0.0, 1.0, 32.0, 4096.0])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_cancels_is_refused_or_served_as_reported(
    hidden: float, policy: Policy, dtype: torch.dtype,
    build_cache: Callable[[str, str], Path], tmp_path: Path, store: PublishedStore,
) -> None:  # fmt: skip
    settings = GateSettings(ProjectorCache(build_cache("float32", "auto")), policy, dtype=dtype)
    admission = judge(forged(settings.cache.modules, hidden).write(tmp_path / "evil"), settings, store)
    if not admission.report.accepted:
        assert codes(admission) <= {"cancellation", "relative_norm", "total_norm", "non_finite"}
        return
    assert admission.folder is not None
    served = load_file(admission.folder / WEIGHTS)
    for module in admission.report.modules:
        a, b = (served[key(module.name, side)].double() for side in "AB")
        size = float((b @ a).norm()) / settings.cache.modules[module.name].aligned_norm
        # Both sides are float64 figures of the same rounded factors.
        assert size == pytest.approx((module.retained or 0.0) * module.relative_norm, rel=1e-6, abs=1e-9)
        assert module.decision == "projected" or policy.select == "threshold"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_exact_opposites_are_refused_whatever_the_policy(
    policy: Policy, gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    draft = forged(gate.cache.modules, 4096.0)
    settings = GateSettings(gate.cache, policy, dtype=torch.bfloat16)
    report = judge(draft.write(tmp_path / "evil"), settings, store).report
    assert not report.accepted and "cancellation" in {reason.code for reason in report.reasons}


def test_a_similarity_that_overflows_is_refused(
    gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    draft = Draft()
    opposite_ends(draft)
    report = admit(draft.write(tmp_path / "evil"), "evil", gate, store).report
    assert not report.accepted


def test_trained_and_random_adapters_are_far_from_the_bound(
    gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        settings = GateSettings(gate.cache, Policy(method="safe-lora", select="all"), dtype=dtype)
        assert judge(Draft().write(tmp_path / str(dtype)), settings, store).report.accepted
