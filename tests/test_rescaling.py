"""B·2ᵏ with A·2⁻ᵏ is the same adapter. No k may move it past the projection.

Without care, Ĉ B overflows or vanishes in the projector's dtype: a similarity that cannot be computed
would then look like an adapter that has nothing to project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate.admit import Admission, GateSettings, admit
from safelora_vllm.methods import METHODS, lowrank
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.refusing import judge
from tests.tiny import Draft

CACHES = [("float32", "dense"), ("bfloat16", "dense"), ("bfloat16", "factored"), ("float16", "auto")]
# Powers that keep every value a normal float32 number, so that nothing else refuses the adapter.
POWERS = [-118, -60, -20, 20, 60, 118]


def rescaled(power: int) -> Draft:
    """An adapter whose values all have sizes from 0.05 to 0.15, then B·2ᵏ and A·2⁻ᵏ."""
    draft = Draft()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in draft.tensors.items():
        sizes = 0.05 + 0.1 * torch.rand(tensor.shape, generator=generator)
        exponent = power if ".lora_B." in name else -power
        draft.tensors[name] = (sizes * tensor.sign()).double().mul(2.0**exponent).float()
    return draft


def answer(power: int, settings: GateSettings, folder: Path) -> Admission:
    """The gate's answer; a refusal has a valid report and publishes nothing."""
    return judge(rescaled(power).write(folder / "adapter"), settings, PublishedStore(folder / "store"))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(
    "policy",
    [Policy(method="safe-lora", select="all"), Policy(method="safe-lora", threshold=0.4)],
    ids=["all", "threshold"],
)
@pytest.mark.parametrize("kind", CACHES, ids="-".join)
def test_a_rescaled_adapter_is_refused_or_treated_like_the_original(
    kind: tuple[str, str], policy: Policy, power: int,
    build_cache: Callable[[str, str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    settings = GateSettings(ProjectorCache(build_cache(*kind)), policy)
    plain = answer(0, settings, tmp_path / "plain").report
    assert plain.accepted and plain.count("projected") > 0
    found = answer(power, settings, tmp_path / "rescaled").report
    if not found.accepted:
        return
    for before, after in zip(plain.modules, found.modules, strict=True):
        assert (after.name, after.decision) == (before.name, before.decision)
        # Powers of two are exact; float16 alone rounds more where its range ends.
        assert after.similarity == pytest.approx(before.similarity, abs=1e-3)
        assert after.relative_norm == pytest.approx(before.relative_norm, rel=1e-12)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_served_does_not_depend_on_how_the_author_split_it(
    method: str, dtype: torch.dtype, power: int, build_cache: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Down to the bits: near the ends of a dtype, rounding would leave other weights than were measured."""
    cache = ProjectorCache(build_cache("bfloat16", "auto"))
    settings = GateSettings(cache, Policy(method=method, energy=0.8), dtype=dtype)
    plain, found = (answer(p, settings, tmp_path / str(p)) for p in (0, power))
    assert plain.folder is not None and found.folder is not None
    assert (found.folder / WEIGHTS).read_bytes() == (plain.folder / WEIGHTS).read_bytes()
    assert found.report.modules == plain.report.modules


@pytest.mark.parametrize("power", [-20, 20])
def test_a_moderate_imbalance_is_served(
    power: int, build_cache: Callable[[str, str], Path], tmp_path: Path, store: PublishedStore
) -> None:
    settings = GateSettings(
        ProjectorCache(build_cache("bfloat16", "dense")), Policy(method="safe-lora", select="all")
    )
    folder = rescaled(power).write(tmp_path / "adapter")
    assert admit(folder, "tenant", settings, store).report.accepted


@pytest.mark.parametrize(
    "values",
    [
        (math.inf, math.inf, 1.0),
        (math.nan, math.nan, 1.0),
        (math.inf, math.inf, math.inf),
        (1.0, math.nan, 1.0),
    ],
)
def test_a_cosine_of_what_is_not_finite_is_not_a_cosine(values: tuple[float, float, float]) -> None:
    found = lowrank.cosine(*values)
    assert found is not None and math.isnan(found)
