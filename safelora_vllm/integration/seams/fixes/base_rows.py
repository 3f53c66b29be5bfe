"""Rows of the base model get no adapter on CPUs."""

from __future__ import annotations

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

_TORCH_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_PUNICA = "vllm.lora.punica_wrapper.punica_cpu"


def _apply() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from safelora_vllm.integration.seams.fixes import slot_operators

    for module in (lora_ops, punica_cpu):
        replace(module, "bgmv_shrink", slot_operators.shrink)
        replace(module, "bgmv_expand", slot_operators.expand)
        replace(module, "bgmv_expand_slice", slot_operators.expand_slice)


BASE_ROWS = Fix(
    name="base rows",
    why=(
        "On CPUs, rows of a batch without an adapter get the weights of the last slot. And a slot's weights "
        "are copied for every row."
    ),
    upstream=f"{VLLM}/pull/48421, {VLLM}/pull/49656",
    safety="Users of the base model would be answered with some tenant's adapter.",
    until="vLLM masks these rows (0.33 does) and multiplies the rows of one slot together",
    apply=_apply,
    requirements=(
        Requirement(
            _TORCH_OPS, "bgmv_shrink",
            parameters=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling"),
        ),
        Requirement(
            _TORCH_OPS, "bgmv_expand",
            parameters=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "add_inputs"),
        ),
        Requirement(
            _TORCH_OPS, "bgmv_expand_slice",
            parameters=(
                "inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "slice_offset",
                "slice_size", "add_inputs",
            ),
        ),
        Requirement(_TORCH_OPS, "sgmv_shrink", references=("bgmv_shrink",)),
        Requirement(_TORCH_OPS, "sgmv_expand", references=("bgmv_expand",)),
        Requirement(_TORCH_OPS, "sgmv_expand_slice", references=("bgmv_expand_slice",)),
        Requirement(_PUNICA, "bgmv_shrink"),
        Requirement(_PUNICA, "bgmv_expand"),
        Requirement(_PUNICA, "bgmv_expand_slice"),
        Requirement(_PUNICA, "PunicaWrapperCPU._shrink_decode", references=("bgmv_shrink",)),
        Requirement(_PUNICA, "PunicaWrapperCPU._expand_decode", references=("bgmv_expand",)),
        Requirement(_PUNICA, "PunicaWrapperCPU._expand_slice_decode", references=("bgmv_expand_slice",)),
    ),
)  # fmt: skip
