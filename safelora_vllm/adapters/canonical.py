"""From vetted tensors to the canonical adapter: one A and one B per module, the scale inside B."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from safelora_vllm.adapters.config import LoRAConfig, parse_config
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits, RawAdapter
from safelora_vllm.errors import AdapterRefused, Fault, Reason, by_cause, named, refuse
from safelora_vllm.projectors.manifest import ModuleEntry, natural_order
from safelora_vllm.safetensors_header import DTYPE_BYTES, TensorHeader

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

_NOT_PLAIN = "not an A or B of plain LoRA; expected are names like base_model.model.MODULE.lora_A.weight"
_NO_PROJECTOR = "no projector, so the delta could not be projected"
_FLAWS = {
    "non_finite": "NaN or infinite values",
    "subnormal": "subnormal values, which slow processors down; set them to zero",
}

_BLOCK = 2**17  # values

Pairs = dict[str, dict[str, str]]  # module name → {"A": tensor name, "B": tensor name}
Weights = dict[str, tuple[Tensor, Tensor]]  # module name → A (r, d_in), B (d_out, r)


def vet(raw: RawAdapter, modules: Mapping[str, ModuleEntry], limits: Limits) -> Weights:
    """The adapter's weights in float32, the scale s folded into B, in the order of module names.

    Raises:
        AdapterRefused: with every reason that the config and the header give, or, once those are
            clean, with those that the values give.
    """
    config, reasons = parse_config(raw.config)
    pairs, odd = _pair_up(raw)
    misfits, foreign = _check_shapes(pairs, raw, modules, config, limits) if config else ([], False)
    reasons += [*odd, *misfits, *_check_covered(pairs, modules, foreign), *_check_targets(pairs, limits)]
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
    for module, sides in pairs.items():
        a, b = (tensors[sides[side]].to(torch.float32) for side in "AB")
        weights[module] = a, b * config.scale(module)
    return weights


def _pair_up(raw: RawAdapter) -> tuple[Pairs, list[Reason]]:
    """The modules that have an A and a B, and the reasons against all other tensors."""
    pairs: Pairs = defaultdict(dict)
    faults = []
    for name in sorted(raw.header, key=natural_order):
        if match := _TENSOR.fullmatch(name):
            pairs[match[1]][match[2]] = name
        else:
            code = next((c for part, c in _FEATURES.items() if part in name), "unknown_tensor")
            faults.append(Fault(code, f"{name!r}", _NOT_PLAIN))
    for module in [module for module, sides in pairs.items() if len(sides) < 2]:
        side = next(iter(pairs.pop(module)))
        faults.append(Fault("unpaired", module, f"lora_{side} without its counterpart"))
    reasons = by_cause(faults)
    if not raw.header:
        reasons.append(Reason("empty", f"{WEIGHTS} holds no tensors"))
    return pairs, reasons


def _check_covered(pairs: Pairs, modules: Mapping[str, ModuleEntry], foreign: bool) -> list[Reason]:
    """Whether all modules have projectors. foreign: a reason says that it is another model's adapter."""
    lacking = [module for module in pairs if module not in modules]
    if foreign or 2 * len(lacking) <= len(pairs):
        return by_cause(Fault("no_projector", module, _NO_PROJECTOR) for module in lacking)
    return [
        Reason(
            "no_projector",
            f"{len(lacking):,} of {len(pairs):,} modules have no projector: {named(lacking)}. The projector "
            f"cache has {named(list(modules))}. The adapter looks made for another model, or the cache was "
            "built for other modules",
        )
    ]


def _check_targets(pairs: Pairs, limits: Limits) -> list[Reason]:
    """Whether vLLM applies all modules: it leaves out the others without a word."""
    if not limits.target_modules:
        return []
    may = f"no adapter may change it here: --lora-target-modules has {', '.join(limits.target_modules)}"
    others = [module for module in pairs if module.rpartition(".")[2] not in limits.target_modules]
    return by_cause(Fault("not_targeted", module, may) for module in others)


def _check_shapes(
    pairs: Pairs,
    raw: RawAdapter,
    modules: Mapping[str, ModuleEntry],
    config: LoRAConfig,
    limits: Limits,
) -> tuple[list[Reason], bool]:
    """What dtypes and shapes say against the modules, and whether most have those of another model."""
    others, faults = [], []
    covered = [module for module in pairs if module in modules]
    for module in covered:
        a, b = (raw.header[pairs[module][side]] for side in "AB")
        shape, expected = _shape_of_product(a, b), modules[module].shape
        if shape is not None and shape != expected:
            others.append(Fault("shape", module, f"B·A has the shape {shape}, the model's weight {expected}"))
        elif fault := _fault(module, a, b, config.rank(module), limits.max_rank):
            faults.append(fault)
    if 2 * len(others) <= len(covered):
        return by_cause(others + faults), False
    _, module, found = others[0]
    count = f"{len(others):,} of {len(covered):,} modules do not fit"
    sentence = f"the adapter looks made for another model: {count}, such as {module}: {found}"
    return [Reason("shape", sentence), *by_cause(faults)], True


def _shape_of_product(a: TensorHeader, b: TensorHeader) -> tuple[int, int] | None:
    """Of B·A. None where A and B are not matrices of one rank."""
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] > 0:
        return None
    return b.shape[0], a.shape[1]


def _fault(module: str, a: TensorHeader, b: TensorHeader, declared: int, max_rank: int) -> Fault | None:
    """What is wrong with a module's pair in itself."""
    if odd := [tensor.dtype for tensor in (a, b) if tensor.dtype not in DTYPE_BYTES]:
        return Fault("dtype", module, f"{odd[0]}; save it as one of {', '.join(DTYPE_BYTES)}")
    if _shape_of_product(a, b) is None:
        return Fault("shape", module, f"A {a.shape} and B {b.shape} are not matrices of one rank")
    rank = a.shape[0]
    if rank > max_rank:
        return Fault("rank_too_large", module, f"rank {rank}, allowed are {max_rank} (--max-lora-rank)")
    if rank != declared:
        return Fault("rank_mismatch", module, f"rank {rank}, its config says {declared}")
    return None


def _check_padding(pairs: Pairs, raw: RawAdapter, limits: Limits) -> list[Reason]:
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
    """Look for NaN, infinities and subnormals."""
    flaws = {name: _flaw(tensors[name]) for name in sorted(tensors, key=natural_order)}
    return by_cause(Fault(flaw, name, _FLAWS[flaw]) for name, flaw in flaws.items() if flaw)


def _flaw(values: Tensor) -> str | None:
    """What is wrong with some values, or with one of them.

    The bits of floats without their sign, read as whole numbers, have the floats' order: several times faster
    to compare than floats of 16 bits are. Block by block, as large as stays in a core's cache.
    """
    whole = torch.int16 if values.dtype.itemsize == 2 else torch.int32
    unsigned = torch.iinfo(whole).max
    limits = torch.tensor([math.inf, torch.finfo(values.dtype).tiny], dtype=values.dtype)
    infinite, normal = limits.view(whole).tolist()
    subnormal = False
    for bits in torch.split(values.contiguous().view(-1).view(whole), _BLOCK):
        sizes = bits & unsigned
        if int(sizes.max()) >= infinite:
            return "non_finite"
        # One less makes zero the largest of all.
        subnormal = subnormal or int((sizes - 1 & unsigned).min()) < normal - 1
    # Subnormal numbers slow processors down and carry nothing. float16's are ordinary small values.
    return "subnormal" if subnormal and values.dtype != torch.float16 else None


def canonical_files(
    weights: Weights, base_model: str, dtype: torch.dtype, revision: str | None = None
) -> dict[str, bytes]:
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
            if _flaw(cast) == "non_finite":
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
        **({"revision": revision} if revision else {}),
    }
    return {
        CONFIG: json.dumps(config, indent=1).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }
