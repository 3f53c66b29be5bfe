"""From vetted tensors to the canonical adapter: one A and one B per module, the scale inside B."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from safelora_vllm.adapters.config import LoRAConfig, parse_config
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits, RawAdapter
from safelora_vllm.errors import AdapterRefused, Reason, refuse
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.safetensors_header import DTYPE_BYTES

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.([A-Za-z0-9_.]{1,512})\.lora_([AB])\.weight")
# What a tensor's name gives away about the PEFT feature that made it.
_FEATURES = {
    "lora_embedding": "embedding",
    "lora_magnitude": "dora",
    "modules_to_save": "modules_to_save",
    "original_module": "modules_to_save",
    "trainable_tokens": "trainable_tokens",
    ".bias": "bias",
    "lora_bias": "bias",
}

Weights = dict[str, tuple[Tensor, Tensor]]  # module name → A (r, d_in), B (d_out, r)


def vet(raw: RawAdapter, modules: Mapping[str, ModuleEntry], limits: Limits) -> Weights:
    """The adapter's weights in float32, the scale s folded into B, in the order of module names.

    Raises:
        AdapterRefused: with every reason that the config and the header give, or, once those are
            clean, with those that the values give.
    """
    config, reasons = parse_config(raw.config)
    pairs, named = _pair_up(raw, modules)
    reasons += named
    if config is not None:
        for module, sides in pairs.items():
            reasons += _check_shapes(module, sides, raw, modules[module], config, limits)
    if not reasons:
        reasons = _check_padding(pairs, raw, limits)
    if reasons:
        raise AdapterRefused(reasons)
    assert config is not None
    try:
        tensors = load(raw.weights)
    except (SafetensorError, ValueError) as error:
        raise refuse("weights_malformed", f"{WEIGHTS} cannot be loaded: {error}") from error
    if reasons := _check_values(tensors):
        raise AdapterRefused(reasons)
    weights: Weights = {}
    for module, sides in sorted(pairs.items()):
        a, b = (tensors[sides[side]].to(torch.float32) for side in "AB")
        weights[module] = a, b * config.scale(module)
    return weights


def _pair_up(
    raw: RawAdapter, modules: Mapping[str, ModuleEntry]
) -> tuple[dict[str, dict[str, str]], list[Reason]]:
    """Module → {"A": tensor name, "B": tensor name} for what is understood, reasons for the rest."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    reasons: list[Reason] = []
    for name in raw.header:
        match = _TENSOR.fullmatch(name)
        if match is None:
            code = next((c for part, c in _FEATURES.items() if part in name), "unknown_tensor")
            reasons.append(Reason(code, f"tensor {name!r:.160} is not a plain LoRA A or B"))
        elif match[1] not in modules:
            detail = f"{match[1]:.160} has no projector, so its delta could not be projected"
            reasons.append(Reason("no_projector", detail))
        else:
            pairs[match[1]][match[2]] = name
    if not raw.header:
        reasons.append(Reason("empty", f"{WEIGHTS} holds no tensors"))
    for module in sorted(module for module, sides in pairs.items() if len(sides) < 2):
        side = next(iter(pairs.pop(module)))
        reasons.append(Reason("unpaired", f"{module} has lora_{side} without its counterpart"))
    return pairs, reasons


def _check_shapes(
    module: str,
    sides: dict[str, str],
    raw: RawAdapter,
    entry: ModuleEntry,
    config: LoRAConfig,
    limits: Limits,
) -> list[Reason]:
    a, b = raw.header[sides["A"]], raw.header[sides["B"]]
    if odd := [t.dtype for t in (a, b) if t.dtype not in DTYPE_BYTES]:
        return [Reason("dtype", f"{module} is {odd[0]}; save it as one of {', '.join(DTYPE_BYTES)}")]
    d_out, d_in = entry.shape
    rank = a.shape[0] if len(a.shape) == 2 else 0
    if rank == 0 or a.shape != (rank, d_in) or b.shape != (d_out, rank):
        return [
            Reason(
                "shape",
                f"{module}: A {a.shape} and B {b.shape} do not fit its weight ({d_out}, {d_in})",
            )
        ]
    if rank > limits.max_rank:
        return [
            Reason(
                "rank_too_large", f"{module} has rank {rank}, allowed are {limits.max_rank} (--max-lora-rank)"
            )
        ]
    if rank != config.rank(module):
        declared = config.rank(module)
        return [Reason("rank_mismatch", f"{module} has rank {rank}, its config says {declared}")]
    return []


def _check_padding(pairs: Mapping[str, dict[str, str]], raw: RawAdapter, limits: Limits) -> list[Reason]:
    """One large rank makes all others as large. An adapter of a single rank is never refused here."""
    rank, row = 0, 0  # row: bytes that each rank takes in all modules
    for sides in pairs.values():
        a, b = (raw.header[sides[side]] for side in "AB")
        rank = max(rank, a.shape[0])
        row += DTYPE_BYTES[a.dtype] * a.shape[1] + DTYPE_BYTES[b.dtype] * b.shape[0]
    if rank * row <= limits.weights_bytes:
        return []
    found = f"padded to its largest rank {rank} it takes {rank * row:,} bytes"
    return [Reason("too_large", f"{found}, allowed are {limits.weights_bytes:,}; train it with one rank")]


def _check_values(tensors: Mapping[str, Tensor]) -> list[Reason]:
    """Look for NaN, infinities and subnormals: at first in all values at once, then by name."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors.values():
        by_dtype[tensor.dtype].append(tensor.flatten())
    if all(_flaw(torch.cat(group)) is None for group in by_dtype.values()):
        return []
    flaws = {name: _flaw(tensor) for name, tensor in tensors.items()}
    return [Reason(flaw, f"{name} has {flaw} values") for name, flaw in flaws.items() if flaw]


def _flaw(values: Tensor) -> str | None:
    sizes = values.abs()
    if not torch.isfinite(sizes).all():
        return "non_finite"
    # Subnormal numbers slow processors down and carry nothing. float16's are ordinary small values.
    tiny = torch.finfo(values.dtype).tiny
    if values.dtype != torch.float16 and bool(((sizes < tiny) & (sizes > 0)).any()):
        return "subnormal"
    return None


def canonical_files(weights: Weights, base_model: str, dtype: torch.dtype) -> dict[str, bytes]:
    """The two files of the canonical PEFT adapter, the same bytes for the same weights.

    Ranks are padded with zeros to the largest one, since vLLM reads one rank; ``lora_alpha = r``
    makes the scale 1.

    Raises:
        AdapterRefused: a value is too large for ``dtype``.
    """
    rank = max(a.shape[0] for a, _ in weights.values())
    tensors = {}
    for module, (a, b) in weights.items():
        for side, tensor, padding in (
            ("A", a, (0, 0, 0, rank - a.shape[0])),
            ("B", b, (0, rank - b.shape[1])),
        ):
            cast = torch.nn.functional.pad(tensor.detach().cpu(), padding).to(dtype)
            if not torch.isfinite(cast).all():
                raise refuse("non_finite", f"{module}: lora_{side} does not fit into {dtype}")
            tensors[f"{_PREFIX}{module}.lora_{side}.weight"] = cast.contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(weights),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
    }
    return {
        CONFIG: json.dumps(config, indent=1).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }
