"""Values at the ends of their dtypes, padding, the cap under other policies. Plain refusals: tests/corpus."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from safelora_vllm.adapters.read import Limits
from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from safelora_vllm.tenants.quotas import Allowance
from tests.refusing import codes, judge
from tests.tiny import K0, Q0, UP0, Draft, key, lora, lora_config

_A, _B = key(Q0, "A"), key(Q0, "B")


def padded(rank: int, others: int) -> Draft:
    """One module of that rank and all others of the other."""
    draft = Draft(config=lora_config(r=others, rank_pattern={K0: rank}), tensors=lora(rank=others))
    draft.change(key(K0, "A"), torch.full((rank, 96), 1e-3))
    draft.change(key(K0, "B"), torch.full((32, rank), 1e-3))
    return draft


def test_one_large_rank_must_not_blow_up_all_others(
    tmp_path: Path, gate: GateSettings, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads one rank, so the others are padded: 2,720 rows and columns in all, of 4 bytes each."""
    folder = padded(512, 1).write(tmp_path / "a")
    size = (folder / "adapter_model.safetensors").stat().st_size
    enough = dataclasses.replace(gate, limits=Limits(weights_bytes=512 * 2720 * 4))
    assert size < 0.06 * enough.limits.weights_bytes
    assert judge(folder, enough, store).report.accepted
    monkeypatch.setattr("safelora_vllm.adapters.canonical.load", lambda _: pytest.fail("loaded"))
    less = dataclasses.replace(gate, limits=Limits(weights_bytes=512 * 2720 * 4 - 1))
    admission = judge(folder, less, PublishedStore(tmp_path / "empty"))
    assert codes(admission) == {"too_large"}
    assert "rank 512 it takes 5,570,560 bytes, allowed are 5,570,559" in admission.report.reasons[0].message


def test_one_large_rank_counts_in_a_quota_for_all_modules(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    """As in the published copy, which the tenant's quota would not bound otherwise."""
    folder, copy = padded(512, 1).write(tmp_path / "a"), 512 * 2720 * 4
    for again in (False, True):
        with pytest.raises(QuotaExceeded, match="padded to its largest rank, the adapter has 5,"):
            admit(folder, "acme/x", gate, store, allowance=Allowance(copy))
        admission = judge(folder, gate, store)
        assert admission.cached is again and copy < admission.nbytes < 1.05 * copy
    even = padded(4, 4).write(tmp_path / "b")
    assert judge(even, gate, store).nbytes == sum(file.stat().st_size for file in even.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_one_rank_and_just_the_allowed_size_is_accepted(
    dtype: torch.dtype, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = padded(4, 4)
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}
    folder = draft.write(tmp_path / "a")
    size = (folder / "adapter_model.safetensors").stat().st_size
    limited = dataclasses.replace(gate, limits=Limits(weights_bytes=size))
    assert judge(folder, limited, store).report.accepted
    limited = dataclasses.replace(gate, limits=Limits(weights_bytes=size - 1))
    assert codes(judge(folder, limited, PublishedStore(tmp_path / "empty"))) == {"too_large"}


def test_rslora_scales_what_would_else_pass(
    tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    report = judge(draft.write(tmp_path / "a"), GateSettings(cache, Policy(method="safe-lora")), store).report
    largest = max(report.values("relative_norm"))
    # α/√4 is twice α/4: between the two norms the first passes and the second does not.
    settings = GateSettings(cache, Policy(method="safe-lora", max_relative_norm=1.5 * largest))
    assert judge(tmp_path / "a", settings, store).report.accepted
    draft.config["use_rslora"] = True
    report = judge(draft.write(tmp_path / "b"), settings, PublishedStore(tmp_path / "empty")).report
    assert {reason.code for reason in report.reasons} == {"relative_norm"}
    assert max(report.values("relative_norm")) == pytest.approx(2 * largest, rel=1e-12)


def test_small_modules_may_be_too_much_together(
    tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    folder = Draft().write(tmp_path / "a")
    report = judge(folder, GateSettings(cache, Policy()), store).report
    squares = [(m.relative_norm * cache.modules[m.name].aligned_norm) ** 2 for m in report.modules]
    whole = sum(entry.aligned_norm**2 for entry in cache.modules.values())
    assert report.total_norm == pytest.approx((sum(squares) / whole) ** 0.5, rel=1e-12)
    assert report.total_norm < max(report.values("relative_norm"))
    tight, wide = (Policy(max_total_norm=share * report.total_norm) for share in (0.999, 1.001))
    assert judge(folder, GateSettings(cache, wide), store).report.accepted
    assert codes(judge(folder, GateSettings(cache, tight), PublishedStore(tmp_path / "empty"))) == {
        "total_norm"
    }
    both = Policy(max_total_norm=0.0, max_relative_norm=0.0)
    refused = judge(folder, GateSettings(cache, both), PublishedStore(tmp_path / "empty"))
    assert codes(refused) == {"relative_norm", "total_norm"}, "all that is wrong is told at once"


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 1e40}, {"lora_alpha": 1e300}, {"alpha_pattern": {"q_proj": 1e308}}]
)
def test_a_scale_beyond_float32_is_refused_in_report_only_mode_too(
    changes: dict[str, object], tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    draft.config.update(changes)
    admission = judge(
        draft.write(tmp_path / "a"),
        GateSettings(cache, Policy(method="safe-lora", mode="report-only")),
        store,
    )
    assert not admission.report.accepted and "non_finite" in codes(admission)


def test_values_that_the_served_dtype_cannot_hold(
    tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    policy = Policy(method="safe-lora", threshold=-1.0, max_relative_norm=1e30, max_total_norm=1e30)
    half = GateSettings(cache, policy, dtype=torch.float16)
    draft.tensors[_A] *= 1e-7
    draft.tensors[_B] *= 1e7  # float16 ends at 65504, but the sides are balanced
    assert judge(draft.write(tmp_path / "a"), half, PublishedStore(tmp_path / "first")).report.accepted
    draft.tensors[_A] *= 1e14
    folder = draft.write(tmp_path / "b")
    assert judge(folder, GateSettings(cache, policy), PublishedStore(tmp_path / "other")).report.accepted
    assert codes(judge(folder, half, store)) == {"non_finite"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtypes_that_are_served(
    dtype: torch.dtype, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}
    assert judge(draft.write(tmp_path / "a"), gate, store).report.accepted


def test_zeros_are_not_subnormal_and_a_zero_delta_is_kept(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    draft.change(_B, torch.zeros(96, 4))
    draft.change(key(K0, "B"), -torch.zeros(32, 4))
    report = judge(draft.write(tmp_path / "a"), gate, store).report
    modules = {module.name: module for module in report.modules}
    for name in (Q0, K0):
        assert modules[name].decision == "kept" and modules[name].relative_norm == 0.0
        assert modules[name].similarity is modules[name].retained is None
    assert report.accepted and modules[UP0].similarity is not None
