"""Sizes, times, modes and refused names that no other test can see: a change here is a decision.

Each is a bound on what a stranger can make the server spend or keep, on how long a fault stays unseen, or on
what is refused before it is read.
"""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import pytest

KIB, MIB, HOUR = 1024, 1024**2, 3600.0
BOUNDS: dict[str, dict[str, Any]] = {
    "files": {"STALE_SECONDS": HOUR, "_TEMPORARY": ".new-", "_ATTEMPTS": 5, "_REMEMBERED": 10_000},
    "errors": {
        "_MAX_MESSAGE": 500, "_MAX_OF_A_CODE": 20, "_MAX_REASONS": 100, "_MAX_IN_MESSAGE": 20, "_NAMED": 3,
        "_MAX_NAME": 90,
    },
    "settings": {
        "SECTION": "safelora", "PLUGIN": "safelora", "ADMIN_KEY": "SAFELORA_ADMIN_API_KEY",
        "ADMIN_KEY_MADE": "SAFELORA_ADMIN_API_KEY_MADE", "METRICS_KEY": "SAFELORA_METRICS_KEY",
        "WORKER": "worker", "LEAST_TOKENS": 8, "MOST_TOKENS": 256,
    },
    "gate.admit": {"_FORMAT": 6},
    "gate.caps": {"_MIN_COHERENCE": 1.5e-3},
    "gate.client": {"_TIMEOUT_SECONDS": 120.0},
    "gate.memory": {"_MARGIN": 8, "_LIBRARY_BYTES": 128 * MIB, "_RANKS": 512},
    "gate.metrics": {
        "_BUCKETS": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        "MAX_TENANTS": 200, "OTHERS": "(others)",
    },
    "gate.refusals": {"_REMEMBERED": 256},
    "gate.server": {"_MAX_LINE": 16 * MIB},
    "gate.service": {
        "_HEADER_BYTES": 16 * MIB, "_COLLECT_SECONDS": 300.0, "_UNREFERENCED_SECONDS": 1800.0,
    },
    "gate.socket_folder": {
        "SOCKET": "gate.sock", "_LOCK": "owner.lock", "_POLL_SECONDS": 0.05, "_STARTING_SECONDS": 60.0,
    },
    "gate.supervisor": {
        "_RESTART_SECONDS": 1.0, "_LOOK_SECONDS": 5.0, "_ANSWER_SECONDS": 15.0, "_SILENCES": 2,
        "_ADAPTER_SECONDS": 600.0,
        "_NOT_INHERITED": (
            "PROMETHEUS_MULTIPROC_DIR", "VLLM_PLUGINS", "SAFELORA_ADMIN_API_KEY", "SAFELORA_METRICS_KEY",
            "SAFELORA_KEY", "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_", "GOOGLE_", "AZURE_",
        ),
    },
    "store.layout": {
        "INCOMING": "incoming", "RAW": "raw", "PUBLISHED": "published", "NAMES": "names", "IDS": "ids",
        "AUDIT": "audit", "FOLDERS": ("incoming", "names", "published", "raw"),
    },
    "projectors.manifest": {
        "FORMAT": "safelora-projectors", "FORMAT_VERSION": 3, "EXACT_VERSION": 2, "_VERSIONS": (2, 3),
        "MANIFEST": "manifest.json", "MODELS": "models.json", "THIN": "thin", "ENERGY_ROUNDING": 1e-9,
        "OPERATORS": {"dense": "projector", "factored": "delta"}, "WHOLE": math.inf,
    },
    "projectors.checkpoint": {
        "_SAMPLES": 8, "_SAMPLE_BYTES": 256, "_PIECE": 8 * MIB,
    },
    "projectors.weight_files": {"_MAX_HEADER": 100 * MIB},
    "projectors.rounding": {"_MOST": 0.5},
    "projectors.cache": {"_REMEMBERED": 100_000, "_SPECTRA": 256},
    "projectors.held": {"SIDES": {"input_basis": 1, "output_basis": 0}},
    "projectors.placement": {"_BUFFERS": 2},
    "projectors.build": {
        "MAX_ENERGY": 0.4, "EXACT_MAX_ENERGY": 0.95, "_SHARD_BYTES": 256 * MIB, "_DOMINANT_FROM": 512,
        "_OF_OPERATORS": ("dtype", "form"),
    },
    "projectors.partial_cache": {"_LOCK": ".lock", "_JOURNAL": ".journal"},
    "projectors.selection": {"_TRANSPOSED_FAMILIES": {"gpt2", "gpt_bigcode", "openai-gpt"}},
    "projectors.weight_change": {"_ELEMENTS": 2**22, "_PLAIN": 2.0**30},
    "projectors.dominant": {
        "_ROWS": 1024, "_SQUARED": 1e-6, "_SPARE": 4, "_OF_V": 2.0**-23, "_OF_PRODUCTS": 2.0**-22,
    },
    "projectors.subspace": {
        "_ROWS": 512, "_FIRST": 32, "_SPARE": 16, "_MORE": 1.3, "_LARGEST": 0.25, "_GROWTH": 1.5,
        "_ROUNDS": 20, "CONVERGED": 1e-2, "_FILTER": math.log(1e7), "_HIGHEST_DEGREE": 8, "_PROBES": 32,
        "_POWERS": 12, "_UNLIKELY": 0.044, "_ROUNDING": 2.0**-20, "_PRODUCTS": 1.001,
    },
    "projectors.sizes": {"_BASIS": 4},
    "projectors.plan": {"CONTEXT_BYTES": 1200 * MIB},
    "projectors.assumed_spectrum": {
        "DECAY": 0.4, "_EXACT": 40, "_GROWTH": 1.1, "_POINTS": (1200, 300), "_APART": 0.02,
        "_QUARTERINGS": 12, "_STEPS": 2, "_SOLVED": 0.01,
    },
    "projectors.build_time": {
        "_CPU_SIDE": 1024, "_CPU_THIN_SIDE": 2048, "_DEVICE_SIDE": 4096, "_RUNS": 2, "_HASHED": 16 * MIB,
    },
    "methods.judge": {"_CPU_BYTES": MIB, "_DEVICE_BYTES": 16 * MIB, "_BASES": 4},
    "methods.lowrank": {"_SHIFT": 2.0**-36},
    "methods.certified": {"_ROUNDING": 2.0**-23},
    "methods.csulora": {"_ALPHA": 0.05},
    "methods.input_removal": {
        "_STEPS": 100, "_ENERGIES": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    },
    "methods.safe_lora": {
        "_THRESHOLDS": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "_NUMBERS": (0.1, 0.25, 0.5, 0.75, 1.0),
    },
    "cli": {"DONE": 0, "PROBLEMS": 1, "USAGE": 2, "REFUSED": 3},
    "cli.options": {
        "UNITS": {
            "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
            "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
        },
    },
    "cli.serve": {"_NEEDED": ("vllm", "fastapi")},
    "cli.plan": {"_GIB": 1024 * MIB, "_MIB": MIB},
    "cli.audit": {"_FILTERS": ("adapter", "actor", "action")},
    "cli.audit_table": {"_UNPROJECTED": ("report-only", "audit"), "_WIDE": 120},
    "store.audit_log": {"_REMEMBERED": 20},
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in BOUNDS.items() for name in names])
def test_a_bound_is_what_was_decided(module: str, name: str) -> None:
    found = getattr(importlib.import_module(f"safelora_vllm.{module}"), name)
    assert found == BOUNDS[module][name] and type(found) is type(BOUNDS[module][name])


def test_the_classes_of_linear_layers_of_which_projectors_are_built() -> None:
    """A layer that vLLM stacks, or one outside of the language model, would be named but never compared."""
    selection = importlib.import_module("safelora_vllm.projectors.selection")
    assert (
        re.compile(
            r"embed|norm|conv|lora_|router|experts|(^|\.)gate$|lm_head"
            r"|visual|vision|audio|tower|multi_modal|projector|connector|resampler|qformer|merger|aligner"
            r"|talker|token2wav|codec|tokenizer|(^|\.)(encoder|protein_encoder|vpm|apm|tts|mlp1)\."
        )
        == selection._NOT_LINEAR
    )
    assert re.compile(r"\.\d+\.") == selection._IN_BLOCK


def test_the_class_of_each_error_that_a_caller_may_catch() -> None:
    errors = importlib.import_module("safelora_vllm.errors")
    found = {
        name: kind.__base__.__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    ours, usage, later = "SafeLoRAError", "UsageError", "Unavailable"
    assert found == {
        "SafeLoRAError": "Exception", "UsageError": ours, "AdapterNotFound": usage, "PolicyError": usage,
        "CheckpointError": usage, "KeysError": usage, "ProjectorCacheError": ours, "UnknownAdapter": ours,
        "AlreadyLoaded": ours, "ChangedMeanwhile": ours, "Unauthorized": ours, "Forbidden": ours,
        "UnknownRoute": ours, "QuotaExceeded": ours, "StoreDamaged": ours, "Unavailable": ours,
        "GateUnavailable": later, "MalformedMessage": "GateUnavailable", "StoreUnavailable": later,
        "EngineUnavailable": later, "ExamUnavailable": later, "GuardError": ours, "AdapterRefused": ours,
    }  # fmt: skip
