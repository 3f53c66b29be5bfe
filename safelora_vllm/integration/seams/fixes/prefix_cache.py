"""Blocks of the prefix cache belong to an adapter's path as well as its name.

Until 0.32, vLLM looks blocks up by an adapter's name. After a new version of a name, its requests would
continue from keys and values that the old version's weights computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

_CACHE = "vllm.v1.core.kv_cache_utils"


def with_path(keys: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """vLLM's ``_gen_lora_extra_hash_keys``, with the adapter's path behind its keys."""

    def keys_and_path(request: Any) -> list[Any]:
        found = keys(request)
        return [*found, request.lora_request.lora_path] if found else found

    return keys_and_path


def _apply() -> None:
    from vllm.v1.core import kv_cache_utils

    replace(kv_cache_utils, "_gen_lora_extra_hash_keys", with_path(kv_cache_utils._gen_lora_extra_hash_keys))


PREFIX_CACHE = Fix(
    name="prefix cache",
    why=(
        "Blocks of the prefix cache are looked up by an adapter's name: a new version of a name continues "
        "from blocks that the old version's weights computed."
    ),
    upstream=f"{VLLM}/issues/30931, {VLLM}/issues/42125",
    safety="Answers of a new version would be made with weights that were replaced or withdrawn.",
    until="0.32 is the oldest: it looks blocks up by name and path",
    fixed_in=(0, 32),
    apply=_apply,
    requirements=(
        Requirement(
            _CACHE, "_gen_lora_extra_hash_keys",
            parameters=("request",),
            references=("lora_request",),
        ),
        Requirement(_CACHE, "generate_block_hash_extra_keys", references=("_gen_lora_extra_hash_keys",)),
    ),
)  # fmt: skip
