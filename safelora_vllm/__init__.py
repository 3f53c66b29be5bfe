"""Safe LoRA for multi-tenant LoRA serving: vet and project adapters before vLLM loads them.

The names below are the Python API; each is loaded when it is first used. Importing the package touches the
standard library only: vLLM imports it in every process, and goes on without the guard where that fails.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_vllm.api import (
        build_projectors,
        calibrate_policy,
        inspect_adapter,
        plan_projectors,
        project_adapter,
        project_adapters,
    )
    from safelora_vllm.bulk.catalogue import ProjectionRecord
    from safelora_vllm.bulk.run import BulkReport
    from safelora_vllm.errors import AdapterRefused, Reason, SafeLoRAError
    from safelora_vllm.methods.calibration import Calibration
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache
    from safelora_vllm.projectors.plan import Plan
    from safelora_vllm.report import ModuleReport, Report

    __version__: str

__all__ = [
    "AdapterRefused",
    "BulkReport",
    "Calibration",
    "ModuleReport",
    "Plan",
    "Policy",
    "ProjectionRecord",
    "ProjectorCache",
    "Reason",
    "Report",
    "SafeLoRAError",
    "__version__",
    "build_projectors",
    "calibrate_policy",
    "inspect_adapter",
    "plan_projectors",
    "project_adapter",
    "project_adapters",
]
_MODULES = {
    "AdapterRefused": "errors",
    "BulkReport": "bulk.run",
    "Calibration": "methods.calibration",
    "ModuleReport": "report",
    "Plan": "projectors.plan",
    "Policy": "policy",
    "ProjectionRecord": "bulk.catalogue",
    "ProjectorCache": "projectors.cache",
    "Reason": "errors",
    "Report": "report",
    "SafeLoRAError": "errors",
    "build_projectors": "api",
    "calibrate_policy": "api",
    "inspect_adapter": "api",
    "plan_projectors": "api",
    "project_adapter": "api",
    "project_adapters": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("safelora-vllm")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
