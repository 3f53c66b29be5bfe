"""What an ``adapter_config.json`` says, read as data: wrong types and unsupported features refuse.

Tensors are believed, promises are not: ``target_modules`` is only type-checked. A tenant's strings
are never compiled as regular expressions (PEFT's ``rank_pattern`` and ``alpha_pattern`` are).
Source of the fields and of the scale: PEFT ``LoraConfig`` and ``LoraLayer.update_layer``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from safelora_vllm.errors import Fault, Reason, by_cause

# Keys that do not change what the saved tensors mean.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Keys that are read below.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "bias",
}  # fmt: skip
# Unsupported features: refused under this code unless the key is empty, false or absent.
_UNSUPPORTED = {
    "use_dora": "dora",
    "modules_to_save": "modules_to_save",
    "lora_bias": "bias",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "alora",
    "trainable_token_indices": "trainable_tokens",
    "target_parameters": "target_parameters",
    "fan_in_fan_out": "fan_in_fan_out",
    "loftq_config": "init",
    "use_qalora": "qalora",
    "use_bdlora": "bdlora",
}
# Initialisations that leave the base weights alone, so that the saved A and B are a plain LoRA.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_PLAIN_SUFFIX = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_MAX_PATTERNS = 4096
_UNKNOWN = "set in the config, but not known to this gate; remove it, or train without it"

# A module's name or a suffix of it, with a ^ before it where it has one → its place in the config, value.
Patterns = dict[str, tuple[int, float]]


@dataclass(frozen=True)
class LoRAConfig:
    """The part of the config that gives the tensors their meaning."""

    r: int
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns

    def rank(self, module: str) -> int:
        """The declared rank of a module."""
        return int(_match(self.ranks, module, self.r))

    def scale(self, module: str) -> float:
        """s in ΔW = s·B·A: α/r, or α/√r with rsLoRA."""
        rank = self.rank(module)
        return _match(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def parse_config(config: dict[str, Any]) -> tuple[LoRAConfig | None, list[Reason]]:
    """The config's meaning, and every reason to refuse it. With reasons there is no meaning."""
    reasons: list[Reason] = []

    def wrong(code: str, detail: str) -> None:
        reasons.append(Reason(code, detail))

    if config.get("peft_type") != "LORA":
        wrong("peft_type", f"peft_type is {config.get('peft_type')!r:.80}: expected 'LORA'")
    for key, code in _UNSUPPORTED.items():
        if config.get(key):
            wrong(code, f"{key} is set, which this gate cannot project; train without it")
    if config.get("bias") not in ("none", None):
        wrong("bias", f"bias is {config['bias']!r:.80}; train with bias='none'")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in _PLAIN_INITS)):
        wrong(
            "init",
            f"init_lora_weights is {init!r:.80}, which changes the base weights; convert the adapter "
            "with PEFT's path_initial_model_for_weight_conversion",
        )
    unknown = sorted(set(config) - _INERT - _READ - set(_UNSUPPORTED))
    reasons += by_cause(Fault("unknown_config", repr(key), _UNKNOWN) for key in unknown if config[key])
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _strings(targets)):
        wrong("config_type", "target_modules is not valid: expected a string or a list of strings")
    if not _rank(config.get("r")):
        wrong("config_type", f"r is {config.get('r')!r:.80}: expected a whole number above 0")
    if not _number(config.get("lora_alpha")):
        wrong("config_type", f"lora_alpha is {config.get('lora_alpha')!r:.80}: expected a number above 0")
    rslora = config.get("use_rslora")
    if not isinstance(rslora, bool | None):
        wrong("config_type", f"use_rslora is {rslora!r:.80}: expected true or false")
    for key, valid in (("rank_pattern", _rank), ("alpha_pattern", _number)):
        reasons += _check_patterns(key, config.get(key), valid)
    if reasons:
        return None, reasons
    ranks, alphas = _index(config.get("rank_pattern")), _index(config.get("alpha_pattern"))
    return LoRAConfig(config["r"], config["lora_alpha"], bool(rslora), ranks, alphas), []


def _check_patterns(key: str, patterns: Any, valid: Any) -> list[Reason]:
    if not patterns and patterns in (None, {}):
        return []
    if not isinstance(patterns, dict):
        return [Reason("config_type", f"{key} is not an object of module names and numbers")]
    if len(patterns) > _MAX_PATTERNS:
        found = f"{key} has {len(patterns):,} patterns, allowed are {_MAX_PATTERNS:,}"
        return [Reason("pattern", f"{found}; write suffixes that several modules share")]
    bad = [name for name in patterns if not _PLAIN_SUFFIX.fullmatch(name.removeprefix("^").removesuffix("$"))]
    only = f"not a valid name in {key}: expected plain module names and suffixes"
    reasons = by_cause(Fault("pattern", repr(name), only) for name in bad)
    if not all(valid(value) for value in patterns.values()):
        reasons.append(Reason("config_type", f"{key} has values that are not numbers above 0"))
    return reasons


def _index(patterns: dict[str, float] | None) -> Patterns:
    table: Patterns = {}
    for place, (pattern, value) in enumerate((patterns or {}).items()):
        table.setdefault(pattern.removesuffix("$"), (place, value))
    return table


def _match(patterns: Patterns, module: str, default: float) -> float:
    """The first pattern that is the module's name or a suffix of it after a dot, as PEFT has it.

    PEFT runs ``(.*\\.)?(PATTERN)$`` of each pattern, in the config's order. Of that language only names
    are read here, so that a module's few suffixes can be looked up instead. Unlike in PEFT, where it is
    any character, a dot in a pattern is a dot.
    """
    suffixes = [module[dot + 1 :] for dot, character in enumerate(module) if character == "."]
    found = [patterns[name] for name in (f"^{module}", module, *suffixes) if name in patterns]
    return float(min(found)[1]) if found else default


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value) and value > 0
    except OverflowError:  # a JSON integer too large for a float
        return False


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
