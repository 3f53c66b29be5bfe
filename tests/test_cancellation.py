"""Ranks that cancel: what is measured must be what is served, in every arithmetic, by every policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.corpus.cancelling import forged, opposite_ends
from tests.refusing import codes, judge
from tests.tiny import Draft, key, lora_config

Q1 = "model.layers.1.self_attn.q_proj"
POLICIES = {
    "threshold": Policy(method="safe-lora", threshold=0.4),
    "number": Policy(method="safe-lora", select="number", number=99),
    **{method: Policy(method=method, select="all", energy=0.8) for method in METHODS},
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


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.float32, "cancellation"), (torch.bfloat16, "cancellation"), (torch.float16, "non_finite")],
    ids=str,
)
def test_opposite_ranks_near_the_end_of_float32_are_refused(
    dtype: torch.dtype, code: str, mode: str, cache: ProjectorCache, tmp_path: Path, store: PublishedStore
) -> None:
    draft = Draft()
    opposite_ends(draft)
    settings = GateSettings(cache, Policy(method="safe-lora", mode=mode), dtype=dtype)
    assert codes(judge(draft.write(tmp_path / "evil"), settings, store)) == {code}


def pair_of_ranks(a: Tensor, u: Tensor, n: Tensor, shares: tuple[float, float]) -> Draft:
    """u aᵀ x + n aᵀ y and its mirror image in u: what the ranks have along u cancels, what is along n stays.

    With u and n of norm 1 the coherence is y²/(x² + y²) for the shares (x, y).
    """
    b = torch.stack([shares[0] * u + shares[1] * n, -shares[0] * u + shares[1] * n], dim=1)
    tensors = {key(Q1, "A"): torch.stack([a, a]), key(Q1, "B"): b}
    return Draft(lora_config(r=2, lora_alpha=2), tensors)


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
@pytest.mark.parametrize(("coherence", "sound"), [(1.42e-3, False), (1.58e-3, True)])
@pytest.mark.parametrize("where", ["uploaded", "served"])
def test_ranks_may_cancel_down_to_the_bound(
    where: str, coherence: float, sound: bool, mode: str, cache: ProjectorCache,
    tmp_path: Path, store: PublishedStore,
) -> None:  # fmt: skip
    """In what came, or only in what is served: Ĉ leaves more of what cancels than of what stays.

    Audit mode does not serve them either: rounding would decide what they do.
    """
    basis, eigen = cache.projector(Q1).output_basis(0.95), cache.projector(Q1).apply
    u, n = basis[:, 0], basis[:, -1]
    loss = float(torch.linalg.vector_norm(eigen(n[:, None])) / torch.linalg.vector_norm(eigen(u[:, None])))
    assert loss < 0.1
    ratio = math.sqrt(coherence / (1 - coherence)) / (loss if where == "served" else 1.0)
    draft = pair_of_ranks(torch.ones(96) / 100, u, n, (0.1, 0.1 * ratio))
    policy = Policy(method="safe-lora", select="all" if where == "served" else "number", number=0, mode=mode)
    report = judge(draft.write(tmp_path / "adapter"), GateSettings(cache, policy), store).report
    assert report.accepted is sound
    if not sound:
        (reason,) = report.reasons
        assert reason.code == "cancellation" and f"to {coherence:.1e} of their squared norm" in reason.message


@pytest.mark.parametrize("module", ["model.layers.0.mlp.down_proj", Q1, "model.layers.1.self_attn.v_proj"])
def test_one_module_that_cancels_is_enough(
    module: str, cache: ProjectorCache, tmp_path: Path, store: PublishedStore
) -> None:
    draft = Draft()
    for side, column in (("A", draft.tensors[key(module, "A")]), ("B", draft.tensors[key(module, "B")].T)):
        column[1:] = 0.0
        column[1] = column[0] if side == "A" else -column[0]
    settings = GateSettings(cache, Policy(method="safe-lora"))
    report = judge(draft.write(tmp_path / "evil"), settings, store).report
    (reason,) = report.reasons
    assert reason.code == "cancellation" and reason.message.startswith(f"{module}: ")


def of_large_values(b: Tensor, a: Tensor) -> Draft:
    """An adapter of one module, both of whose sides have float16's largest values."""
    tensors = {key(Q1, "A"): a * (6e4 / a.abs().max()), key(Q1, "B"): b * (6e4 / b.abs().max())}
    return Draft(lora_config(r=a.shape[0], lora_alpha=a.shape[0]), tensors)


def sentences(
    policy: Policy, dtype: torch.dtype, cache: ProjectorCache, folder: Path, root: Path
) -> list[str]:
    """What the gate says of an adapter under a policy whose caps allow everything."""
    free = dataclasses.replace(policy, max_relative_norm=1e30, max_total_norm=1e30)
    store = PublishedStore(root / str(dtype))
    report = judge(folder, GateSettings(cache, free, dtype=dtype), store).report
    return [reason.message for reason in report.reasons]


_NOT_FINITE = (
    f"{Q1}: scaling (lora_alpha) or projecting gave values that are not finite; use a smaller lora_alpha"
)


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
@pytest.mark.parametrize(
    "values", [{"select": "all"}, {"threshold": 0.0}, {"select": "number", "number": 1}], ids=str
)
def test_a_similarity_that_overflows_is_refused(
    values: dict[str, Any], mode: str, enlarging: ProjectorCache, tmp_path: Path
) -> None:
    """Also where the policy would leave the module as it is: no policy can choose by such a similarity."""
    first = enlarging.projector(Q1).output_basis(0.95)[:, :1]
    folder = of_large_values(first, torch.ones(1, 96)).write(tmp_path / "evil")
    policy = Policy(method="safe-lora", mode=mode, **values)
    assert sentences(policy, torch.float32, enlarging, folder, tmp_path) == []
    assert sentences(policy, torch.float16, enlarging, folder, tmp_path) == [_NOT_FINITE]


def test_a_policy_that_selects_no_module_measures_no_similarity(
    enlarging: ProjectorCache, tmp_path: Path
) -> None:
    """What is served is what was uploaded, and that is finite."""
    first = enlarging.projector(Q1).output_basis(0.95)[:, :1]
    folder = of_large_values(first, torch.ones(1, 96)).write(tmp_path / "evil")
    policy = Policy(method="safe-lora", select="number", number=0)
    assert sentences(policy, torch.float16, enlarging, folder, tmp_path) == []


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
@pytest.mark.parametrize("method", ["input-removal", "csulora"])
def test_what_would_be_served_and_overflows_is_refused(
    method: str, mode: str, cache: ProjectorCache, tmp_path: Path
) -> None:
    """Two ranks that meet in every second row become one rank with larger values there."""
    rows = torch.ones(96, 2)
    rows[1::2, 1] = -1.0
    folder = of_large_values(rows, torch.ones(2, 96)).write(tmp_path / "evil")
    policy = Policy(method=method, mode=mode, energy=0.05)
    assert sentences(policy, torch.float32, cache, folder, tmp_path) == []
    assert sentences(policy, torch.float16, cache, folder, tmp_path) == [_NOT_FINITE]


def test_trained_and_random_adapters_are_far_from_the_bound(
    gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        settings = GateSettings(gate.cache, Policy(method="safe-lora", select="all"), dtype=dtype)
        assert judge(Draft().write(tmp_path / str(dtype)), settings, store).report.accepted
