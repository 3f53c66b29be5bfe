"""No adapter is added to the logits on CPUs.

The gate refuses adapters that change the head. vLLM adds the head's empty slots all the same, by the rows
that are sampled. The engine ends when a request asks for its prompt's log-probabilities, for which there are
other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_PUNICA = "vllm.lora.punica_wrapper.punica_cpu"


def skip_lora_logits(
    self: PunicaWrapperCPU,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Tensor,
    lora_b_stacked: Tensor,
    scale: float,
    **more: Any,
) -> None:
    """In place of ``PunicaWrapperCPU.add_lora_logits``."""
    del self, y, x, lora_a_stacked, lora_b_stacked, scale, more


def _apply() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    replace(PunicaWrapperCPU, "add_lora_logits", skip_lora_logits)


HEAD = Fix(
    name="head",
    why=(
        "On CPUs with LoRA, one request for its prompt's log-probabilities (`prompt_logprobs`, or `echo` "
        "with `logprobs`) ends the engine."
    ),
    upstream=f"{VLLM}/issues/16668, {VLLM}/issues/29955",
    until="vLLM's CPU wrapper takes the rows of prompts",
    apply=_apply,
    requirements=(
        Requirement(
            _PUNICA, "PunicaWrapperCPU.add_lora_logits",
            parameters=("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "..."),
        ),
        Requirement(
            "vllm.lora.layers.logits_processor", "LogitsProcessorWithLoRA._get_logits",
            references=("add_lora_logits", "can_update_inplace"),
        ),
    ),
)  # fmt: skip
