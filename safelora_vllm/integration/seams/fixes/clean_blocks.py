"""Blocks of the key-value cache are zeroed before they are used again, on CPUs.

vLLM's attention takes what a finished request left behind a sequence's end times zero, which for NaN and
infinity is NaN. One adapter that overflows, as in float16 it can within any cap, would spoil the answers of
whoever gets its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def always(_config: KVCacheConfig) -> bool:
    """In place of ``KVCacheConfig.needs_kv_cache_zeroing``."""
    return True


def _apply() -> None:
    from vllm import platforms
    from vllm.v1.kv_cache_interface import KVCacheConfig

    if platforms.current_platform.is_cpu():
        replace(KVCacheConfig, "needs_kv_cache_zeroing", property(always))


CLEAN_BLOCKS = Fix(
    name="clean blocks",
    why=(
        "On CPUs, attention reads past the end of a sequence: NaN that a request left in a block of the key-"
        "value cache turns the answer of the block's next user into NaN."
    ),
    upstream=f"{VLLM}/issues/39146, {VLLM}/pull/39283",
    safety="One tenant's data would change another's answer.",
    until="vLLM's attention on CPUs leaves out what is behind the end, or vLLM zeroes these blocks itself",
    apply=_apply,
    requirements=(
        Requirement("vllm.v1.kv_cache_interface", "KVCacheConfig.needs_kv_cache_zeroing"),
        Requirement("vllm.platforms", "__getattr__"),
        Requirement("vllm.platforms.interface", "Platform.is_cpu", parameters=("self",)),
        Requirement(
            "vllm.v1.core.sched.scheduler", "Scheduler.__init__",
            assigns=("needs_kv_cache_zeroing",),
        ),
        Requirement(
            "vllm.v1.worker.cpu_model_runner", "CPUModelRunner._zero_block_ids",
            parameters=("self", "block_ids"),
        ),
    ),
)  # fmt: skip
