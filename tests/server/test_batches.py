"""What a batch of several adapters and the base model needs of vLLM, and does not get without us."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import profile
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest

from safelora_vllm.integration.plugin import register
from safelora_vllm.integration.seams.fixes import slot_operators
from safelora_vllm.integration.seams.fixes.fix import original

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
    """Fails when vLLM masks these rows itself: then the fix can go."""
    assert shrink(original(lora_ops, "bgmv_shrink")).any()


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("slots", [[2], [-1], [0, 2], [-1, 0, 1, 2]], ids=str)
@pytest.mark.parametrize("add", [True, False])
def test_operators_give_what_each_rows_own_slot_does(rows: int, slots: list[int], add: bool) -> None:
    """Few rows, one slot and many rows of many slots go different ways to the same result."""
    register()
    generator = torch.Generator().manual_seed(rows)
    indices = torch.tensor(slots)[torch.randint(len(slots), (rows,), generator=generator)]
    inputs = torch.randn(rows, WIDTH, generator=generator)
    a = torch.randn(SLOTS, 1, RANK, WIDTH, generator=generator)
    b = torch.randn(SLOTS, 1, 2 * WIDTH, RANK, generator=generator)
    before = torch.randn(rows, 4 * WIDTH, generator=generator)
    inner, output = torch.full((rows, RANK), 7.0), before.clone()
    punica_cpu.bgmv_shrink(inputs, a, inner, indices, 0.5)
    punica_cpu.bgmv_expand_slice(inner, b, output, indices, WIDTH, 2 * WIDTH, add)
    whole = before.clone()
    punica_cpu.bgmv_expand(inner, b, whole, indices, add)

    deltas = [b[s, 0].double() @ a[s, 0].double() for s in range(SLOTS)]
    for row, slot in enumerate(indices.tolist()):
        change = 0.5 * deltas[slot] @ inputs[row].double() if slot >= 0 else torch.zeros(2 * WIDTH).double()
        expected = before[row].double()
        for found, at in ((output, WIDTH), (whole, 0)):
            wanted = expected.clone()
            wanted[at : at + 2 * WIDTH] = change + (expected[at : at + 2 * WIDTH] if add else 0.0)
            torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-4)


def test_vllm_still_copies_weights_for_each_row() -> None:
    """Fails when vLLM multiplies the rows of one slot together: then the fix can go."""
    rows, width = 512, 256
    weights = torch.zeros(SLOTS, 1, width, 16)

    def largest(function: Callable[..., None]) -> int:
        arguments = torch.zeros(rows, 16), weights, torch.zeros(rows, width), torch.zeros(rows).long(), 0
        with profile(profile_memory=True) as trace:
            function(*arguments, width)
        return max(event.self_cpu_memory_usage for event in trace.key_averages())

    copied = rows * weights[0].nbytes
    assert largest(original(lora_ops, "bgmv_expand_slice")) >= copied
    assert largest(slot_operators.expand_slice) < copied / 8


def test_two_versions_of_one_name_are_two_adapters() -> None:
    register()
    old, new = LoRARequest("tenant", 1, "safelora://a"), LoRARequest("tenant", 2, "safelora://b")
    assert len({old, new, LoRARequest("tenant", 2, "safelora://b")}) == 2


def test_vllm_still_takes_them_for_one() -> None:
    """Fails when vLLM compares ids: then the fix can go."""
    same = original(LoRARequest, "__eq__")
    assert same(LoRARequest("tenant", 1, "safelora://a"), LoRARequest("tenant", 2, "safelora://b"))
