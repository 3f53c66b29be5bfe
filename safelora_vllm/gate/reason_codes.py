"""What a gate's answers are counted by: the codes of its refusals, and the errors that keep it from one.

A test compares the codes with the places that give them. docs/troubleshooting.md explains each.
"""

from __future__ import annotations

REFUSED = (
    "alora", "archive_ambiguous", "archive_malformed", "archive_unsafe", "bdlora", "bias",
    "cancellation", "config_malformed", "config_type", "dora", "dtype", "embedding", "empty",
    "fan_in_fan_out", "init", "layer_replication", "missing_file", "modules_to_save", "no_projector",
    "non_finite", "not_regular_file", "not_targeted", "pattern", "peft_type", "qalora", "rank_mismatch",
    "rank_too_large", "relative_norm", "shape", "signature", "subnormal", "target_parameters", "too_large",
    "total_norm", "trainable_tokens", "unknown_config", "unknown_tensor", "unpaired", "unreadable_file",
    "unsafe_format", "weights_malformed",
)  # fmt: skip
FAILED = ("OutOfMemoryError", "StoreUnavailable")
