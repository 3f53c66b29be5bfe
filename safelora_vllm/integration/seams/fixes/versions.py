"""Two versions of one name in a batch are two adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def same_adapter(self: LoRARequest, other: object) -> bool:
    """By name and id, in place of ``LoRARequest.__eq__``.

    vLLM collects the adapters of a batch in a set. By name only, one of two versions would be put into the
    slots, and the other's rows would end the engine.
    """
    if not isinstance(other, type(self)):
        return False
    return bool(self.lora_int_id == other.lora_int_id and self.lora_name == other.lora_name)


def _apply() -> None:
    from vllm.lora.request import LoRARequest

    replace(LoRARequest, "__eq__", same_adapter)


VERSIONS = Fix(
    name="versions",
    why=(
        "Adapters are compared by name: two versions of one name in a batch, as every hot swap has them, can"
        " end the engine."
    ),
    upstream=f"none found; introduced by {VLLM}/pull/6566",
    until="vLLM compares ids",
    apply=_apply,
    requirements=(
        Requirement("vllm.lora.request", "LoRARequest.__eq__", references=("lora_name",)),
        Requirement("vllm.lora.request", "LoRARequest.__hash__", references=("lora_name",)),
    ),
)
