"""What the config says: features that are not served, wrong types, lies, regular expressions."""

from __future__ import annotations

from typing import Any

from tests.corpus.case import Hostile, Spoil, config, neutralised, spoiled

_HUGE = 10**400


def each(row: str, key: str, code: str, values: list[Any]) -> list[Hostile]:
    """One case per value of a key."""
    return [spoiled(f"{key}={value!r:.30}", row, code, config(**{key: value})) for value in values]


def without(name: str) -> Spoil:
    """Leave a key out."""
    return lambda draft: draft.config.pop(name)


FEATURES = [
    *each("features", "use_dora", "dora", [True, 1, "yes"]),
    *each("features", "lora_bias", "bias", [True, "true"]),
    *each("features", "bias", "bias", ["all", "lora_only", True, "", [], {}]),
    *each("features", "modules_to_save", "modules_to_save", [["lm_head"], "lm_head", {"a": 1}]),
    *each("features", "layer_replication", "layer_replication", [[[0, 2], [1, 2]], True]),
    *each("features", "alora_invocation_tokens", "alora", [[1, 2], True]),
    *each("features", "trainable_token_indices", "trainable_tokens", [[1], {"embed_tokens": [1]}]),
    *each("features", "target_parameters", "target_parameters", [["mlp.experts.gate_up_proj"]]),
    *each("features", "fan_in_fan_out", "fan_in_fan_out", [True, 1]),
    *each("features", "use_qalora", "qalora", [True]),
    *each("features", "use_bdlora", "bdlora", [True, {"a": 1}]),
    *each("features", "loftq_config", "init", [{"loftq_bits": 4}]),
    *each("features", "init_lora_weights", "init", [
        "pissa", "pissa_niter_16", "olora", "loftq", "corda", "PISSA", "", 1, 0.5, [], ["gaussian"], {},
    ]),
    *each("features", "arrow_config", "unknown_config", [{"a": 1}]),
    *each("features", "megatron_config", "unknown_config", [{"a": 1}]),
    *each("features", "velora_config", "unknown_config", [{"a": 1}]),
    spoiled("key-of-tomorrow", "features", "unknown_config", config(use_next_thing=True)),
    spoiled("key-with-newline", "features", "unknown_config", config(**{"a\nb\x1b[31m\ud800": 1})),
    spoiled("key-very-long", "features", "unknown_config", config(**{"k" * 100_000: 1})),
    *each("features", "peft_type", "peft_type", ["IA3", "ADALORA", "lora", "", None, 1, ["LORA"], {}]),
    spoiled("no-peft-type", "features", "peft_type", without("peft_type")),
]  # fmt: skip

LIES = [
    spoiled("no-r", "config", "config_type", without("r")),
    spoiled("no-alpha", "config", "config_type", without("lora_alpha")),
    *each("config", "r", "config_type", [True, 0, -1, "4", 4.0, None, [4], {}]),
    *each("config", "r", "rank_mismatch", [3, 16]),
    *each("config", "r", "rank_mismatch config_type", [_HUGE]),
    *each("config", "lora_alpha", "config_type", [
        True, 0, -8, 0.0, "8", "NaN", None, [8], {}, _HUGE, -_HUGE,
    ]),
    *each("config", "use_rslora", "config_type", ["true", 1, 0, [], {"a": 1}]),
    *each("config", "target_modules", "config_type", [[1], {"q_proj": 1}, 3, True, [["q_proj"]]]),
    *each("config", "rank_pattern", "config_type", [[], ["q_proj"], "q_proj", 3, False, {"q_proj": "8"}]),
    *each("config", "rank_pattern", "config_type", [{"q_proj": True}, {"q_proj": 0}, {"q_proj": 4.0}]),
    *each("config", "rank_pattern", "rank_mismatch", [{"q_proj": 8}, {"layers.0.self_attn.q_proj": 1}]),
    *each("config", "rank_pattern", "rank_mismatch config_type", [{"q_proj": _HUGE}]),
    *each("config", "alpha_pattern", "config_type", [[1], "q_proj", {"q_proj": "8"}, {"q_proj": [8]}]),
    *each("config", "alpha_pattern", "config_type", [{"q_proj": True}, {"q_proj": -8}, {"q_proj": _HUGE}]),
    *[
        neutralised(f"{key}={value!r:.30}", "config", config(**{key: value}))
        for key, value in {
            "target_modules": ["lm_head"],
            "layers_to_transform": [9999],
            "exclude_modules": "all",
            "base_model_name_or_path": "../../../etc/passwd",
            "revision": "\x1b[2Jmain\n",
        }.items()
    ],
    *[
        neutralised(f"target_modules={value!r:.30}", "config", config(target_modules=value))
        for value in (None, [], "all-linear", r".*(.|.)+[0-9]")
    ],
]  # fmt: skip

# The last five take a backtracking matcher longer than the universe against a name of 31 characters, also
# the one that vLLM uses, which sees through simpler ones.
EXPRESSIONS = [
    ".*", ".*q_proj", "(q|v)_proj", "q_proj|v_proj", "[qv]_proj", "q_proj\\b", "(a+)+$", "(a|a)*$",
    "", "^", "$", "q proj", "q_proj\n", "x" * 600, "модуль", "(", "(?R)",
    "(.|.)+[0-9]", "(?:.|.)+[0-9]", "(?=(.|.)+[A-Z])a",
]  # fmt: skip
# Against a module name of 30 characters each of these takes a backtracking matcher 2**30 steps.
_NESTED = {"(" * depth + "[a-z_.0-9]+" + ")+" * depth + "!": 4 for depth in range(2, 40)}

PATTERNS = [
    *[
        spoiled(f"{name}-{pattern!r:.20}", "patterns", "pattern", config(**{name: {pattern: 4}}))
        for name in ("rank_pattern", "alpha_pattern")
        for pattern in EXPRESSIONS
    ],
    spoiled("rank_pattern-nested", "patterns", "pattern", config(rank_pattern=_NESTED)),
    spoiled("alpha_pattern-nested", "patterns", "pattern", config(alpha_pattern=_NESTED)),
    spoiled(
        "rank_pattern-20000", "patterns", "pattern",
        config(rank_pattern={f"{'a.' * 9}{number}": 4 for number in range(20_000)}),
    ),
]  # fmt: skip

CASES = [*FEATURES, *LIES, *PATTERNS]
