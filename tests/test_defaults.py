"""What holds where nobody says otherwise: of methods, dataclasses and public functions.

Golden: a change here changes what the same call or command does, or makes a policy less strict.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import safelora_vllm
from safelora_vllm import api
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.calibration import Calibration
from safelora_vllm.methods.method import Calibrator, Effect, Method, Option
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.projectors.partial_cache import PartialCache
from safelora_vllm.projectors.placement import Demand
from safelora_vllm.projectors.projector import Parts, Spectrum
from safelora_vllm.projectors.sizes import CacheBytes
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import housekeeping
from safelora_vllm.store.audit_log import AuditLog

# name → selection, energy, whether it reads Ĉ or V, and L, the memory of its work, and its options; of each
# option, whether more of it is stricter.
REGISTRY = {
    "safe-lora": ("threshold", 0.2, True, False, 8, {}),
    "input-removal": ("all", 0.2, False, False, 8, {"energy": True}),
    "csulora": ("all", 0.95, False, True, 21, {"energy": False}),
}


def test_the_registry_of_methods() -> None:
    assert {
        name: (
            method.select,
            method.energy,
            method.reads_operator,
            method.reads_output_bases,
            method.work,
            {field: option.more_is_stricter for field, option in method.options.items()},
        )
        for name, method in METHODS.items()
    } == REGISTRY
    assert all(name == method.name for name, method in METHODS.items())
    calibrated = {name: method.calibrator is not None for name, method in METHODS.items()}
    assert calibrated == {"safe-lora": True, "input-removal": True, "csulora": False}


def test_a_policy_that_says_nothing() -> None:
    policy = Policy()
    assert (policy.method, policy.select, policy.energy, policy.mode) == (
        "input-removal",
        "all",
        0.2,
        "enforce",
    )


DEFAULTS: dict[type, dict[str, Any]] = {
    Option: {"more_is_stricter": False},
    Method: {
        "select": "all", "energy": 0.2, "reads_operator": False, "reads_output_bases": False, "work": 8,
        "calibrator": None,
    },
    Calibrator: {"search": None},
    Effect: {},
    Calibration: {"limited_by_cache": False},
    Parts: {"operator": True, "input_energy": 1.0, "output_energy": 1.0},
    CacheBytes: {"operator": 0, "input_basis": 0, "output_basis": 0, "energy": 0},
    ModuleEntry: {"following": 1.0},
    PartialCache: {},
    Spectrum: {"residual": 0.0},
    Demand: {"shares": 0},
    ModuleReport: {"similarity_error": 0.0, "uncertain": False},
    Report: {"total_norm": 0.0, "signed_by": ""},
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_of_a_dataclass(kind: type) -> None:
    fields = dataclasses.fields(kind)
    found = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    assert found == DEFAULTS[kind]


def test_a_build_of_which_nothing_is_said() -> None:
    plain, exact = BuildOptions(), BuildOptions(exact=True)
    assert dataclasses.astuple(plain) == ((), "bfloat16", "auto", "cpu", 0.4, False)
    assert dataclasses.astuple(exact) == ((), "bfloat16", "auto", "cpu", 0.95, True)
    assert [BuildOptions(exact=exact, max_energy=0.5).max_energy for exact in (False, True)] == [0.5, 0.5]


HOUR = 3600.0
ARGUMENTS: list[tuple[Any, dict[str, Any]]] = [
    (
        api.build_projectors,
        {
            "modules": (), "dtype": "bfloat16", "form": "auto", "device": "cpu", "max_energy": None,
            "exact": False,
        },
    ),
    (
        api.plan_projectors,
        {
            "policy": None, "projectors": None, "modules": (), "max_energy": None, "exact": False,
            "lora_rank": 16, "gpu_memory": None, "device": "cpu", "projector_memory": None,
            "projector_host_memory": 0,
        },
    ),
    (api.inspect_adapter, {"policy": None, "device": "cpu"}),
    (api.project_adapter, {"policy": None, "device": "cpu", "base_model": None}),
    (api.calibrate_policy, {"policy": None, "keep_random": None}),
    (
        ProjectorCache.load,
        {"placement": None, "input_energy": 1.0, "output_energy": 1.0, "operator": True},
    ),
    (housekeeping.collect, {"min_age_seconds": HOUR}),
    (housekeeping.unreferenced_raw, {"min_age_seconds": HOUR}),
    (housekeeping.collect_unreferenced, {"min_age_seconds": HOUR}),
    (housekeeping.verify, {"progress": iter, "stale_seconds": HOUR}),
    (housekeeping.clean, {"stale_seconds": HOUR}),
    (AuditLog, {"max_bytes": 64 * 1024**2}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), ARGUMENTS, ids=[f.__name__ for f, _ in ARGUMENTS])
def test_defaults_of_arguments(function: Any, expected: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if "echo" in given:
        assert given.pop("echo")({}) is None  # nowhere else
    assert given == expected


# They add up while a gate, a build, a comparison or a download works.
MUTABLE = {"Stages", "PartialCache", "Rescaling", "_Object"}


def test_dataclasses_are_frozen() -> None:
    """What is shared between threads, and what an answer was decided by, cannot be changed afterwards."""
    mutable = set()
    for module in pkgutil.walk_packages(safelora_vllm.__path__, "safelora_vllm."):
        if module.name.startswith("safelora_vllm.integration"):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                frozen = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
                mutable |= set() if frozen else {kind.__name__}
    assert mutable == MUTABLE


def test_names_of_the_package_are_its_modules_own_and_no_others() -> None:
    assert sorted(safelora_vllm._MODULES) == sorted({*safelora_vllm.__all__} - {"__version__"})
    for name, module in safelora_vllm._MODULES.items():
        found = getattr(safelora_vllm, name)
        assert found is getattr(importlib.import_module(f"safelora_vllm.{module}"), name)
        assert vars(safelora_vllm)[name] is found, "looked up once"
    with pytest.raises(AttributeError, match="module 'safelora_vllm' has no attribute 'Unknown'"):
        _ = safelora_vllm.Unknown
    assert {*safelora_vllm.__all__, "__doc__", "errors"} <= set(dir(safelora_vllm))


def test_the_version_of_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        assert name == "safelora-vllm"
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert safelora_vllm._version() == "0+unknown"
