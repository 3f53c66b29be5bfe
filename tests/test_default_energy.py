"""A cache that has less energy than a method's default: complaints say that nobody chose it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import safelora_vllm as sl
from safelora_vllm.errors import PolicyError
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import Draft, Pair

DEFAULTS = {"input-removal": 0.2, "csulora": 0.95}


@pytest.mark.parametrize(
    ("what", "method"),
    [("calibrate", "input-removal"), ("inspect", "csulora"), ("project", "csulora"), ("plan", "csulora")],
)
def test_the_default_energy_is_called_so(
    what: str, method: str, thin_at: Callable[[float], ProjectorCache], pair: Pair, tmp_path: Path
) -> None:
    cache, adapter = thin_at(0.02), Draft().write(tmp_path / "adapter")
    calls: dict[str, Callable[[sl.Policy], Any]] = {
        "calibrate": lambda policy: sl.calibrate_policy(cache, policy),
        "inspect": lambda policy: sl.inspect_adapter(adapter, cache, policy),
        "project": lambda policy: sl.project_adapter(adapter, cache, tmp_path / "out", policy),
        "plan": lambda policy: sl.plan_projectors(pair.aligned, projectors=cache, policy=policy),
    }
    default = DEFAULTS[method]
    with pytest.raises(PolicyError, match=rf"{default} is the default of `method` '{method}'"):
        calls[what](sl.Policy(method=method))
    with pytest.raises(PolicyError) as chosen:
        calls[what](sl.Policy(method=method, energy=0.5))
    assert "is the default of" not in str(chosen.value)


def test_a_plan_before_a_build_says_so_too(pair: Pair) -> None:
    with pytest.raises(PolicyError, match=r"0\.95 is the default of `method` 'csulora'"):
        sl.plan_projectors(pair.aligned, policy=sl.Policy(method="csulora"), max_energy=0.4)
