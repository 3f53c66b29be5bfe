"""LoRA operators for CPUs, in place of vLLM's torch ones (vllm/lora/ops/torch_ops/lora_ops.py).

vLLM copies a slot's weights once for every row of the batch: a prompt of a thousand tokens copies its
adapter a thousand times. Here the rows of one slot are multiplied together. Each row still meets its own
slot's weights only, and rows without an adapter (index -1, which vLLM takes for the last slot) get none.

Shapes: rows t, slots s, inputs (t, in), weights (s, 1, out, in) or (s, out, in), indices (t,).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# With fewer rows to a slot, one product of copied weights is faster than many small ones.
_ROWS_PER_SLOT = 12


def shrink(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """``output[t, :out] = scaling · W_s(t) inputs[t]``, zero where there is no slot."""
    weights = _stacked(lora_b_weights)
    target = output_tensor[:, : weights.shape[1]]
    for rows, product in _products(inputs, weights, lora_indices_tensor, output_tensor.dtype):
        target[rows] = scaling * product
    output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0.0)


def expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """``output[t] += W_s(t) inputs[t]``, over as many columns as both have; inputs are what `shrink` gave."""
    width = min(_stacked(lora_b_weights).shape[1], output_tensor.shape[1])
    expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """``output[t, offset : offset + size] += W_s(t) inputs[t]``."""
    weights = _stacked(lora_b_weights)[:, :slice_size]
    target = output_tensor[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        target.zero_()
    for rows, product in _products(inputs, weights, lora_indices_tensor, output_tensor.dtype):
        target[rows] += product


def _products(
    inputs: Tensor, weights: Tensor, indices: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """Rows, and ``W_s(t) inputs[t]`` for them (rows, out). What rows without a slot get means nothing."""
    inputs = inputs.to(dtype)
    slots = torch.unique(indices).tolist() if len(indices) >= _ROWS_PER_SLOT else []
    if len(slots) == 1:
        yield slice(None), inputs @ weights[slots[0]].to(dtype).T
    elif slots and len(slots) * _ROWS_PER_SLOT <= len(indices):
        for slot in slots:
            rows = (indices == slot).nonzero().squeeze(1)
            yield rows, inputs[rows] @ weights[slot].to(dtype).T
    else:
        yield slice(None), torch.einsum("ti,toi->to", inputs, weights[indices].to(dtype))


def _stacked(weights: Tensor) -> Tensor:
    return weights.squeeze(1) if weights.dim() == 4 else weights
