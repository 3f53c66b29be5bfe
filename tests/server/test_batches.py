"""What a batch of several adapters and the base model needs of vLLM, and does not get without us."""

from __future__ import annotations

import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest

from safelora_vllm.integration import seams
from safelora_vllm.integration.plugin import register

ROWS, SLOTS, RANK, WIDTH = 5, 3, 4, 16
INDICES = torch.tensor([0, -1, 2, 1, -1])


def shrink(function: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    weights = torch.randn(SLOTS, 1, RANK, WIDTH, generator=generator)
    output = torch.full((ROWS, RANK), 7.0)
    function(inputs, weights, output, INDICES, 2.0)  # type: ignore[operator]
    for row, slot in enumerate(INDICES.tolist()):
        if slot >= 0:
            expected = 2.0 * weights[slot, 0].double() @ inputs[row].double()
            # float32 sums of 16 terms
            torch.testing.assert_close(output[row].double(), expected, rtol=1e-5, atol=1e-5)
    return output[INDICES < 0]


def test_rows_of_the_base_model_get_no_adapter() -> None:
    register()
    for function in (punica_cpu.bgmv_shrink, lora_ops.bgmv_shrink):
        assert not shrink(function).any()


def test_vllm_still_gives_them_the_last_slot() -> None:
    """Fails when vLLM masks these rows itself: then the seam can go."""
    assert shrink(seams.vllm_shrink).any()


def test_two_versions_of_one_name_are_two_adapters() -> None:
    register()
    old, new = LoRARequest("tenant", 1, "safelora://a"), LoRARequest("tenant", 2, "safelora://b")
    assert len({old, new, LoRARequest("tenant", 2, "safelora://b")}) == 2
